"""Make a LoRA of a fine-tune, or of a DreamBooth model, and put it into another model.

The page is docs/recipes/extract-from-model.md.
"""

from kitchen import Found, between, checkpoint, deltas, error, fine_tune, lorakit, serve, times


def cook() -> Found:
    """Find a planted change of rank 8 again, and see what the wrong base does to it."""
    checkpoint("base")
    fine_tune("tuned", seed=1, rank=8, noise=0.0002, norms=True)
    fine_tune("other", seed=2, rank=8, noise=0.01)

    lorakit(
        "extract base.safetensors tuned.safetensors --energy 0.999 --conv-rank 32"
        " -o difference.safetensors"
    )
    lorakit("extract base.safetensors tuned.safetensors --rank 8 -o no-convs.safetensors")
    lorakit("extract base.safetensors tuned.safetensors --as full -o whole.safetensors")
    lorakit("extract other.safetensors tuned.safetensors --rank 8 -o wrong.safetensors")
    lorakit("merge difference.safetensors --into base.safetensors -o rebuilt.safetensors")
    lorakit("compare tuned.safetensors rebuilt.safetensors")
    lorakit("merge difference.safetensors:0.7 --into other.safetensors -o moved.safetensors")
    change, moved = between("base", "tuned"), between("other", "moved")
    return {
        "lost of the layers": error(deltas("difference"), change),
        "lost of the rebuilt model": error(between("base", "rebuilt"), change),
        "error of the moved change": error(moved, times(change, 0.7)),
    }


if __name__ == "__main__":
    serve(cook)
