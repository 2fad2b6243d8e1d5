"""Choose a dim: what each rank keeps of a LoRA, and what the model would feel of the rest.

The page is docs/recipes/choose-dim.md.
"""

from kitchen import Found, checkpoint, deltas, error, lorakit, plant, serve, train


def cook() -> Found:
    """Plant rank 6 in a LoRA of dim 32, the rest of it noise, and find the 6 again."""
    checkpoint("base")
    plant("learnt", seed=1, rank=6)
    plant("noise", seed=2, rank=26)
    train("character", {"learnt": 1, "noise": 0.05}, rank=32)

    lorakit("inspect character.safetensors --spectrum")
    lorakit("resize character.safetensors --rank 6 -o dim6.safetensors --verify")
    lorakit("resize character.safetensors --energy 0.9 -o share.safetensors")
    lorakit(
        "resize character.safetensors --against base.safetensors --threshold -3.5"
        " -o felt.safetensors"
    )
    learnt = deltas("learnt")
    return {
        "error of dim 32": error(deltas("character"), learnt),
        "error of dim 6": error(deltas("dim6"), learnt),
        "error at 90 % of the energy": error(deltas("share"), deltas("character")),
        "error of what the model feels": error(deltas("felt"), deltas("character")),
    }


if __name__ == "__main__":
    serve(cook)
