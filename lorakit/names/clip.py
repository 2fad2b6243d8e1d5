"""The text encoders: Hugging Face's names, and OpenCLIP's with q, k and v in one tensor."""

from collections.abc import Iterator

from lorakit.names.architectures import ModuleName

_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_MLP = ("mlp.fc1", "mlp.fc2")
_NORMS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
_OPEN_CLIP = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def clip(component: str, layers: int) -> Iterator[ModuleName]:
    """Yield the modules of a text encoder that the single file names as Hugging Face does."""
    for layer in range(layers):
        for name in (*_LINEAR, *_MLP):
            path = f"text_model.encoder.layers.{layer}.{name}"
            yield ModuleName(module=f"{component}.{path}", original=path)
        for name in _NORMS:
            path = f"text_model.encoder.layers.{layer}.{name}"
            yield ModuleName(module=f"{component}.{path}", original=path, norm=True)
    last = "text_model.final_layer_norm"
    yield ModuleName(module=f"{component}.{last}", original=last, norm=True)
    yield ModuleName(module=f"{component}.text_projection", original="text_projection")


def open_clip(component: str, layers: int) -> Iterator[ModuleName]:
    """Yield the modules of an OpenCLIP text encoder: q, k, v are thirds of `attn.in_proj_weight`.

    Source: open_clip's `ResidualAttentionBlock`; supermerger looks these up under names that are
    not there, and loses them in silence.
    """
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        path = f"text_model.encoder.layers.{layer}"
        for third, name in enumerate(_LINEAR[:3]):
            yield ModuleName(
                module=f"{component}.{path}.{name}",
                original=f"{block}.attn.in_proj",
                part=(third, third + 1, 3),
                parameter="_weight",
            )
        for name, original in _OPEN_CLIP.items():
            yield ModuleName(module=f"{component}.{path}.{name}", original=f"{block}.{original}")
        for name, original in _NORMS.items():
            yield ModuleName(
                module=f"{component}.{path}.{name}", original=f"{block}.{original}", norm=True
            )
    yield ModuleName(
        module=f"{component}.text_model.final_layer_norm", original="ln_final", norm=True
    )
    yield ModuleName(
        module=f"{component}.text_projection",
        original="text_projection",
        transpose=True,
        parameter="",
    )
