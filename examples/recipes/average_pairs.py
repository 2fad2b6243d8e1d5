"""Average several pairs: what they agree on stays, what each learnt by accident fades.

The page is docs/recipes/average-pairs.md.
"""

from kitchen import Found, cosine, deltas, error, inner, lorakit, plant, serve, train

PAIRS = ("pair-1", "pair-2", "pair-3", "pair-4")


def cook() -> Found:
    """Average four trainings, in each of which the accident is as loud as the change."""
    plant("truth", seed=1, rank=4, text=False)
    for seed, pair in enumerate(PAIRS, start=10):
        plant(f"accident-of-{pair}", seed=seed, rank=8, text=False)
        train(pair, {"truth": 1, f"accident-of-{pair}": 1}, rank=12)
    pairs = " ".join(f"{pair}.safetensors" for pair in PAIRS)

    lorakit(f"compare {pairs}")
    lorakit(f"merge {pairs} --normalize -o mean.safetensors")
    lorakit(f"merge {pairs} --normalize --rank 4 -o change.safetensors")
    truth, change = deltas("truth"), deltas("change")
    return {
        "error of one pair": error(deltas("pair-1"), truth),
        "error of the mean": error(deltas("mean"), truth),
        "error of the mean at rank 4": error(change, truth),
        "cosine of one pair to the truth": cosine(deltas("pair-1"), truth),
        "cosine of the result to the truth": cosine(change, truth),
        "strength of the truth in the result": inner(change, truth) / inner(truth, truth),
    }


if __name__ == "__main__":
    serve(cook)
