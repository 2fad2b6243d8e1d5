"""Average styles: several style LoRAs at 0.4 each, instead of one LoRA of an average style.

The page is docs/recipes/average-styles.md.
"""

from kitchen import Found, deltas, error, lorakit, norm, plant, serve, total, train

STYLES = ("ink", "pastel", "flat")


def cook() -> Found:
    """Merge three unrelated styles, then three that share most of what they do."""
    plant("common", seed=9, rank=8, text=False)
    for seed, style in enumerate(STYLES, start=1):
        plant(style, seed=seed, rank=8, text=False)
        train(f"{style}-alike", {"common": 0.9, style: 0.4}, rank=16)
    stack = " ".join(f"{style}.safetensors:0.4" for style in STYLES)
    alike = " ".join(f"{style}-alike.safetensors" for style in STYLES)

    lorakit(f"merge {stack} -o mix.safetensors")
    lorakit(f"merge {stack} --rank 16 -o mix16.safetensors")
    lorakit(f"compare {alike}")
    lorakit(f"merge {alike} --normalize --rank 16 -o mean.safetensors")
    one, other = norm(deltas("ink")), norm(deltas("ink-alike"))
    return {
        "error of the sum": error(deltas("mix"), total(dict.fromkeys(STYLES, 0.4))),
        "size of the mix beside one style": norm(deltas("mix")) / one,
        "size of the mean of styles that are alike": norm(deltas("mean")) / other,
    }


if __name__ == "__main__":
    serve(cook)
