"""Move a LoRA between kohya, diffusers, PEFT and ComfyUI: other names, the same change.

The page is docs/recipes/move-between-tools.md.
"""

from kitchen import Found, deltas, error, lorakit, plant, serve

SOME = "middle_block|output_blocks_0_|_layers_0_"
"""The middle, an output block, both text encoders."""


def cook() -> Found:
    """Send an SDXL LoRA round, and compare it with itself at every stop."""
    plant("character", seed=1, rank=8, alpha=4, architecture="sdxl", only=SOME)

    lorakit("convert character.safetensors --to diffusers -o for-diffusers.safetensors --verify")
    lorakit("convert character.safetensors --to comfyui -o for-comfyui.safetensors")
    lorakit("convert character.safetensors --to peft -o for-peft")
    lorakit("convert for-diffusers.safetensors --to kohya -o back.safetensors")
    lorakit("inspect for-diffusers.safetensors")
    lorakit("compare character.safetensors back.safetensors")
    character = deltas("character", "sdxl")
    return {
        f"error of {name}": error(deltas(name, "sdxl"), character)
        for name in ("for-diffusers", "for-comfyui", "back")
    }


if __name__ == "__main__":
    serve(cook)
