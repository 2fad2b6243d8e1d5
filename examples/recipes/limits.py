"""What merges cannot do, in numbers.

The page is docs/recipes/limits.md.
"""

from kitchen import (
    Found,
    between,
    checkpoint,
    cosine,
    deltas,
    error,
    lorakit,
    norm,
    plant,
    serve,
    total,
)

CHARACTERS = ("anna", "bert", "carl", "dina", "emil", "fred")


def cook() -> Found:
    """Try what does not work, and measure how it fails."""
    checkpoint("base")
    plant("style", seed=1, text=False)
    plant("for-sdxl", seed=2, architecture="sdxl", only="middle_block")
    for seed, name in enumerate(CHARACTERS, start=3):
        plant(name, seed=seed, rank=8, text=False)
    everyone = " ".join(f"{name}.safetensors" for name in CHARACTERS)

    lorakit("merge style.safetensors for-sdxl.safetensors -o both.safetensors", status=1)
    lorakit("merge style.safetensors --into base.safetensors -o baked.safetensors --dtype bf16")
    lorakit("merge style.safetensors:-1 --into baked.safetensors -o undone.safetensors")
    lorakit("merge anna.safetensors style.safetensors:-0.6 -o less.safetensors")
    lorakit(f"merge {everyone} --rank 8 -o crowd.safetensors")
    lorakit("merge anna.safetensors bert.safetensors --method ties -o ties.safetensors")
    lorakit("resize anna.safetensors --rank 2 -o thin.safetensors")
    lorakit("resize thin.safetensors --rank 8 -o thick.safetensors")
    style, anna = deltas("style"), deltas("anna")
    undone = norm(between("base", "undone")) / norm(style)
    crowd = error(deltas("crowd"), total(dict.fromkeys(CHARACTERS, 1)))
    return {
        "left of a style, baked and undone in bf16": undone,
        "cosine of a character and a style that it never had": cosine(anna, style),
        "cosine after 0.6 of it was taken away": cosine(deltas("less"), style),
        "lost of six characters at rank 8": crowd,
        "cosine of a character and its merge by ties": cosine(anna, deltas("ties")),
        "cosine of a character and the plain sum": cosine(anna, total({"anna": 1, "bert": 1})),
        "lost of a character, cut to rank 2 and set to 8": error(deltas("thick"), anna),
    }


if __name__ == "__main__":
    serve(cook)
