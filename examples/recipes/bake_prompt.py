"""Bake a prompt: all of its <lora:…> tags in one file, or in the checkpoint.

The page is docs/recipes/bake-prompt.md.
"""

from pathlib import Path

from kitchen import Deltas, Found, between, checkpoint, deltas, error, lorakit, plant, serve

PROMPT = "masterpiece, <lora:style:0.8:lbw=OUTALL>, 1girl, <lora:character:0.5:0.3>"


def cook() -> Found:
    """Bake the stack of a prompt, and compare it with what the tags say."""
    checkpoint("base")
    Path("loras").mkdir()
    plant("loras/style", seed=1, rank=8)
    plant("loras/character", seed=2, rank=4)

    lorakit(f'merge --prompt "{PROMPT}" --lora-dir loras -o stack.safetensors')
    lorakit(
        f'merge --prompt "{PROMPT}" --lora-dir loras --into base.safetensors'
        " -o baked.safetensors --verify"
    )
    lorakit("inspect stack.safetensors")
    lorakit(
        'merge --prompt "<lora:style:0.8:start=10>" --lora-dir loras -o late.safetensors',
        status=2,
    )
    said = what_the_tags_say()
    return {
        "error of the stack": error(deltas("stack"), said),
        "error of the baked checkpoint": error(between("base", "baked"), said),
    }


def what_the_tags_say() -> Deltas:
    """Return the sum: OUTALL keeps the text encoder and the output blocks; 0.5 is the encoder's."""
    said = {}
    for layer, delta in deltas("loras/character").items():
        said[layer] = delta * (0.3 if layer.startswith("unet.") else 0.5)
    for layer, delta in deltas("loras/style").items():
        if layer.startswith(("text_encoder.", "unet.up_blocks.")):
            said[layer] = said[layer] + 0.8 * delta
    return said


if __name__ == "__main__":
    serve(cook)
