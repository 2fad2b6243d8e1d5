"""T5's encoder: one name for each module in every layout, Hugging Face's."""

from collections.abc import Iterator

from lorakit.names.architectures import ModuleName

XXL = 24
"""Layers of T5-XXL, the T5 of every image model."""
_LAYERS = {
    "layer.0.SelfAttention": ("q", "k", "v", "o"),
    "layer.1.DenseReluDense": ("wi_0", "wi_1", "wo"),
}


def t5(component: str, layers: int) -> Iterator[ModuleName]:
    """Yield the modules of a T5 encoder.

    Source: transformers' `T5EncoderModel`, whose names the single files keep.
    """
    for block in range(layers):
        for layer, names in _LAYERS.items():
            for name in names:
                path = f"encoder.block.{block}.{layer}.{name}"
                yield ModuleName(module=f"{component}.{path}", original=path)
