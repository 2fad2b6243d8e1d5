"""Cut the blocks that a LoRA does not need: a smaller file that disturbs less.

The page is docs/recipes/cut-blocks.md.
"""

from pathlib import Path

from kitchen import Found, deltas, error, lorakit, norm, plant, serve, times

SOME = "blocks_0_|layers_0_|_proj_"
"""The first transformer block of each attention, and the first layer of each text encoder."""


def cook() -> Found:
    """Keep the output blocks of an SDXL LoRA, and see that they stay what they were."""
    plant("character", seed=1, rank=4, architecture="sdxl", only=SOME)

    lorakit("cut-blocks --list character.safetensors")
    lorakit("cut-blocks character.safetensors --preset OUTALL -o out.safetensors")
    lorakit("cut-blocks character.safetensors --keep OUT00-OUT02,MID -o deep.safetensors")
    lorakit("cut-blocks character.safetensors --elements MID-OUT05:attn2:0 -o mute.safetensors")
    lorakit(
        "cut-blocks character.safetensors --weights 1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0"
        " -o wrong.safetensors",
        status=2,
    )
    lorakit("merge character.safetensors:0.8:lbw=OUTALL -o baked.safetensors")
    whole, out = deltas("character", "sdxl"), deltas("out", "sdxl")
    kept = {k: delta for k, delta in whole.items() if k.startswith(("unet.up_blocks.", "text_"))}
    return {
        "layers before": len(whole),
        "layers after": len(out),
        "error of what stays": error(out, kept),
        "share of the change that stays": (norm(out) / norm(whole)) ** 2,
        "size of the file beside the whole": _size("out") / _size("character"),
        "error of the baked block weights": error(deltas("baked", "sdxl"), times(kept, 0.8)),
    }


def _size(name: str) -> int:
    return Path(f"{name}.safetensors").stat().st_size


if __name__ == "__main__":
    serve(cook)
