"""The copy machine on SDXL: subtract the LoRAs, not the models, and leave the text encoders out.

The page is docs/recipes/copy-machine-sdxl.md.
"""

from kitchen import Found, checkpoint, deltas, error, lorakit, plant, serve, train

SOME = "middle_block|output_blocks_0_|_layers_0_"
"""A few layers of each kind: the middle, an output block, both text encoders."""


def cook() -> Found:
    """Find the planted change from two LoRAs, and from the two models that they make."""
    checkpoint("base", "sdxl")
    plant("image", seed=1, rank=12, architecture="sdxl", only=SOME)
    plant("truth", seed=2, rank=4, architecture="sdxl", only=SOME)
    train("before", {"image": 1}, rank=16, architecture="sdxl")
    train("after", {"image": 1, "truth": 1}, rank=16, architecture="sdxl")

    lorakit("extract before.safetensors after.safetensors --rank 4 -o change.safetensors")
    lorakit("cut-blocks change.safetensors --drop BASE -o change-unet.safetensors")
    lorakit("merge before.safetensors --into base.safetensors -o copier.safetensors")
    lorakit("merge after.safetensors --into base.safetensors -o copier-after.safetensors")
    lorakit(
        "extract copier.safetensors copier-after.safetensors --rank 4 -o from-models.safetensors"
    )
    truth = deltas("truth", "sdxl")
    unet = {layer: delta for layer, delta in truth.items() if layer.startswith("unet.")}
    return {
        "lost from the LoRAs": error(deltas("change", "sdxl"), truth),
        "lost from the models in fp16": error(deltas("from-models", "sdxl"), truth),
        "lost of the UNet's part": error(deltas("change-unet", "sdxl"), unet),
        "layers of the text encoders": len(truth) - len(unet),
        "layers of the result": len(deltas("change-unet", "sdxl")),
    }


if __name__ == "__main__":
    serve(cook)
