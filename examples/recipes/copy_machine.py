"""The copy machine: a LoRA of nothing but the change between two images.

`before` and `after` are LoRAs that were overfitted on one image each. What they share is the image;
what is left when it is taken away is the change. The page is docs/recipes/copy-machine.md.
"""

from kitchen import Found, between, checkpoint, cosine, deltas, error, lorakit, plant, serve, train


def cook() -> Found:
    """Make a copier by merging, then find the planted change by subtracting."""
    checkpoint("base")
    plant("image", seed=1, rank=12)
    plant("truth", seed=2, rank=4)
    train("before", {"image": 1}, rank=16)
    train("after", {"image": 1, "truth": 1}, rank=16)

    lorakit("merge before.safetensors --into base.safetensors -o copier.safetensors --dtype fp32")
    lorakit("merge before.safetensors --into base.safetensors -o rounded.safetensors --dtype bf16")
    lorakit("extract before.safetensors after.safetensors -o exact.safetensors")
    lorakit("inspect exact.safetensors --spectrum")
    lorakit("extract before.safetensors after.safetensors --rank 4 -o change.safetensors")
    lorakit(
        "extract base.safetensors+before.safetensors:0.9 base.safetensors+after.safetensors"
        " --rank 8 -o change-90.safetensors"
    )
    image, change = deltas("before"), deltas("change")
    return {
        "lost of the copier in fp32": error(between("base", "copier"), image),
        "lost of the copier in bf16": error(between("base", "rounded"), image),
        "lost of the change": error(change, deltas("truth")),
        "cosine of the change and the image": abs(cosine(change, image)),
    }


if __name__ == "__main__":
    serve(cook)
