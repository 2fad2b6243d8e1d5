"""Anima, a Cosmos-Predict2 with an adapter of its own: diffusers' names and the single file's."""

from collections.abc import Iterator, Mapping
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.decoder import decoder
from lorakit.names.flux import Names, named, norms
from lorakit.names.wan import stack_block, stack_blocks

_DEPTH, _ADAPTER_DEPTH = 28, 6
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_TO = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
_MODULATED = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_BLOCK: Names = {
    **{
        f"{there}.{name}": f"{here}.{to}"
        for there, here in _ATTENTIONS.items()
        for name, to in _TO.items()
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{there}.{i}": f"{here}.linear_{i}"
        for there, here in _MODULATED.items()
        for i in (1, 2)
    },
}
_NORMS = {
    f"{there}.{letter}_norm": f"{here}.norm_{letter}"
    for there, here in _ATTENTIONS.items()
    for letter in "qk"
}
_ENDS: Names = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_END_NORMS = {"t_embedding_norm": "time_embed.norm"}
_ADAPTER_BLOCK = (
    *(f"{attn}.{letter}_proj" for attn in _ATTENTIONS for letter in "qkvo"),
    *("mlp.0", "mlp.2"),
)
_ADAPTER_NORMS = (
    *(f"{attn}.{letter}_norm" for attn in _ATTENTIONS for letter in "qk"),
    *(f"norm_{layer}" for layer in _MODULATED),
)
_EMBEDDERS = ("x_embedder", "t_embedder", "t_embedding_norm", "patch_embed", "time_embed")
_ROOTS = {
    **dict.fromkeys(("blocks", "transformer_blocks"), "B"),
    **dict.fromkeys((*_EMBEDDERS, "llm_adapter", "text_conditioner"), "IN"),
    **dict.fromkeys(("final_layer", "norm_out", "proj_out"), "OUT"),
}


def _norms(names: Mapping[str, str], here: str = "", there: str = "") -> Iterator[ModuleName]:
    return norms(names, here=here, there=there, parameter=".weight")


def _adapter() -> Iterator[ModuleName]:
    """Yield the adapter's modules, which diffusers holds in a component of their own.

    Source: diffusers' `AnimaTextConditioner` and `_convert_non_diffusers_anima_lora_to_diffusers`.
    """
    blocks = [f"blocks.{i}." for i in range(_ADAPTER_DEPTH)]
    layers = ("out_proj", *(block + name for block in blocks for name in _ADAPTER_BLOCK))
    normed = ("norm", *(block + name for block in blocks for name in _ADAPTER_NORMS))
    for path in (*layers, *normed):
        yield ModuleName(
            module=f"transformer.llm_adapter.{path}",
            original=f"llm_adapter.{path}",
            norm=path in normed,
            also=((f"text_conditioner.{path}", None),),
        )


@cache
def _anima() -> tuple[ModuleName, ...]:
    """Make the table.

    Source: diffusers' `convert_cosmos_transformer_checkpoint_to_diffusers`.
    """
    found = [*named(_ENDS), *_norms(_END_NORMS)]
    for i in range(_DEPTH):
        here, there = f"transformer_blocks.{i}.", f"blocks.{i}."
        found += named(_BLOCK, here=here, there=there)
        found += _norms(_NORMS, here, there)
    return (*found, *_adapter(), *decoder("text_encoder", 28))


ANIMA = Architecture(
    id="anima",
    title="Anima",
    base_model_version="anima",
    modelspec="anima",
    build=_anima,
    roots=tuple(_ROOTS),
    # Those of Cosmos-Predict2 2B. Sana names its blocks alike.
    widths={"to_q": 2048},
    common=True,
    kohya_original=True,
    clips={"text_encoder": "qwen3_06b"},
    places={},
    blocks=stack_blocks(_DEPTH),
    block=partial(stack_block, roots=_ROOTS),
    family="anima",
)
