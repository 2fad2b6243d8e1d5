"""A LECO and a character in one file: one tag in the prompt, and every layer once.

The page is docs/recipes/leco-character.md.
"""

from kitchen import Found, deltas, error, lorakit, plant, serve, total

SOME = "middle_block|mid_block|output_blocks_0_|up_blocks_0_attentions_0_|_layers_0_"
"""A few layers in both spellings: kohya's, of the character, and diffusers', of the LECO."""


def cook() -> Found:
    """Merge a character of rank 8, alpha 4, with a LECO of rank 4, alpha 8, its encoders dead."""
    plant("character", seed=1, rank=8, alpha=4, architecture="sdxl", only=SOME)
    plant(
        "leco",
        seed=2,
        rank=4,
        alpha=8,
        architecture="sdxl",
        dialect="kohya-diffusers",
        only=SOME,
        dead="lora_te",
    )

    lorakit("inspect leco.safetensors --blocks")
    lorakit("convert leco.safetensors --repair -o leco-clean.safetensors")
    lorakit("compare character.safetensors leco.safetensors")
    lorakit("merge character.safetensors leco.safetensors -o both.safetensors --verify")
    lorakit("merge character.safetensors:0.8 leco.safetensors:1.2 --rank 8 -o small.safetensors")
    both = deltas("both", "sdxl")
    return {
        "error of the sum": error(both, total({"character": 1, "leco": 1}, "sdxl")),
        "layers of the character": len(deltas("character", "sdxl")),
        "layers of both": len(both),
    }


if __name__ == "__main__":
    serve(cook)
