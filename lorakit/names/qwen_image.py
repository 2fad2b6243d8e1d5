"""Qwen-Image: one layout, diffusers'."""

from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.decoder import decoder
from lorakit.names.flux import ADD_QKV, TO_QKV, named, norms
from lorakit.names.wan import stack_block, stack_blocks

_DEPTH = 60
_BLOCK = (
    *(*TO_QKV, *ADD_QKV, "attn.to_out.0", "attn.to_add_out"),
    *(
        f"{side}_{layer}"
        for side in ("img", "txt")
        for layer in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
    ),
)
_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
_ENDS = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)
_ROOTS = {
    "transformer_blocks": "B",
    **dict.fromkeys(("img_in", "txt_in", "txt_norm", "time_text_embed"), "IN"),
    **dict.fromkeys(("norm_out", "proj_out"), "OUT"),
}


@cache
def _qwen_image() -> tuple[ModuleName, ...]:
    """Make the table.

    Source: diffusers' `QwenImageTransformer2DModel`, whose names ComfyUI's single files keep.
    """
    blocks = [f"transformer_blocks.{i}." for i in range(_DEPTH)]
    paths = (*_ENDS, *(block + name for block in blocks for name in _BLOCK))
    normed = ("txt_norm", *(block + norm for block in blocks for norm in _NORMS))
    return (
        *named({path: path for path in paths}),
        *norms({path: path for path in normed}, here="", there="", parameter=".weight"),
        *decoder("text_encoder", 28),
    )


QWEN_IMAGE = Architecture(
    id="qwen-image",
    title="Qwen-Image",
    base_model_version="qwen_image",
    modelspec="Qwen-Image",
    marks=("qwen-image",),
    build=_qwen_image,
    roots=tuple(_ROOTS),
    widths={"to_q": 3072},
    kohya_original=False,
    clips={"text_encoder": "qwen25_7b"},
    places={},
    blocks=stack_blocks(_DEPTH),
    block=partial(stack_block, roots=_ROOTS),
    family="qwen-image",
)
