"""PixArt alpha and sigma: diffusers' names and those of the original single file."""

from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.flux import Names, named
from lorakit.names.t5 import XXL, t5
from lorakit.names.wan import stack_block, stack_blocks

_DEPTH = 28
_BLOCK: Names = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_ENDS: Names = {
    "x_embedder.proj": "pos_embed.proj",
    **{
        f"{there}_embedder.mlp.{layer}": f"adaln_single.emb.{here}_embedder.{linear}"
        for there, here in {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}.items()
        for layer, linear in {0: "linear_1", 2: "linear_2"}.items()
    },
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
"""Alpha alone embeds the picture's size and its aspect ratio."""
_EMBEDDERS = ("x_embedder", "t_embedder", "csize_embedder", "ar_embedder", "y_embedder", "t_block")
_ROOTS = {
    **dict.fromkeys(("blocks", "transformer_blocks"), "B"),
    **dict.fromkeys((*_EMBEDDERS, "pos_embed", "adaln_single", "caption_projection"), "IN"),
    **dict.fromkeys(("final_layer", "proj_out"), "OUT"),
}


@cache
def _pixart() -> tuple[ModuleName, ...]:
    """Make the table.

    Source: diffusers' `convert_pixart_alpha_to_diffusers` and `convert_pixart_sigma_to_diffusers`.
    """
    blocks = (
        name
        for i in range(_DEPTH)
        for name in named(_BLOCK, here=f"transformer_blocks.{i}.", there=f"blocks.{i}.")
    )
    return (*named(_ENDS), *blocks, *t5("text_encoder", XXL))


PIXART = Architecture(
    id="pixart",
    title="PixArt alpha and sigma",
    base_model_version="pixart",
    modelspec="pixart",
    build=_pixart,
    roots=tuple(_ROOTS),
    widths={"to_q": 1152, "qkv": 1152},
    # Sana names its blocks alike.
    common=True,
    kohya_original=False,
    clips={"text_encoder": "t5xxl"},
    places={},
    blocks=stack_blocks(_DEPTH),
    block=partial(stack_block, roots=_ROOTS),
    family="pixart",
)
