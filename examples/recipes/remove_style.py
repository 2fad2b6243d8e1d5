"""Remove a style that a character learnt by accident, such as the look of 3D renders.

The page is docs/recipes/remove-style.md.
"""

from kitchen import Found, checkpoint, cosine, deltas, error, inner, lorakit, plant, serve, train


def cook() -> Found:
    """Plant a character with 0.6 of a style in it, and take the style out by projection."""
    checkpoint("base")
    plant("own", seed=1, rank=8)
    plant("style-3d", seed=2, rank=8, alpha=4)
    train("character", {"own": 1, "style-3d": 0.6}, rank=16)

    lorakit("compare character.safetensors style-3d.safetensors")
    lorakit("merge character.safetensors style-3d.safetensors:-0.6 --rank 16 -o flat.safetensors")
    lorakit("compare flat.safetensors style-3d.safetensors")
    lorakit("merge character.safetensors style-3d.safetensors:-1 --rank 16 -o too-flat.safetensors")
    lorakit(
        "merge style-3d.safetensors:0.9 --into base.safetensors -o base-3d.safetensors --dtype fp32"
    )
    style, character = deltas("style-3d"), deltas("character")
    return {
        "best k": inner(character, style) / inner(style, style),
        "cosine to the style before": cosine(character, style),
        "cosine to the style after": cosine(deltas("flat"), style),
        "cosine to the style after too much": cosine(deltas("too-flat"), style),
        "error of what is left": error(deltas("flat"), deltas("own")),
    }


if __name__ == "__main__":
    serve(cook)
