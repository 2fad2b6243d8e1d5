"""Decoders that serve as text encoders: Gemma, Qwen and Llama under Hugging Face's names."""

from collections.abc import Iterator

from lorakit.names.architectures import ModuleName

_LAYER = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_STARTS = ("", "model.language_model.", "language_model.model.")
"""What stands for `model.` where the file holds a bare model, or one that sees images too."""


def decoder(component: str, layers: int) -> Iterator[ModuleName]:
    """Yield the linear layers of a decoder.

    Source: transformers' `Gemma2Model`, `Qwen3Model`, `LlamaModel` and `Qwen2_5_VLModel`; single
    files keep the names of the model with a head.
    """
    for layer in range(layers):
        for place, names in _LAYER.items():
            for name in names:
                path = f"layers.{layer}.{place}.{name}"
                yield ModuleName(
                    module=f"{component}.model.{path}",
                    original=f"model.{path}",
                    also=tuple((start + path, None) for start in _STARTS),
                )
