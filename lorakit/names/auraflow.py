"""AuraFlow: diffusers' names and those of the original single file."""

from collections.abc import Iterator
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.flux import Names, flux_blocks, named
from lorakit.names.t5 import t5
from lorakit.names.wan import stack_block

_JOINT, _SINGLE = 4, 32
_TEXT_LAYERS = 24
_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_TO = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_ADD = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
_JOINT_BLOCK: Names = {
    **{f"attn.w2{letter}": f"attn.{to}" for letter, to in _TO.items()},
    **{f"attn.w1{letter}": f"attn.{add}" for letter, add in _ADD.items()},
    **{f"mlpX.{layer}": f"ff.{linear}" for layer, linear in _MLP.items()},
    **{f"mlpC.{layer}": f"ff_context.{linear}" for layer, linear in _MLP.items()},
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
}
_SINGLE_BLOCK: Names = {
    **{f"attn.w1{letter}": f"attn.{to}" for letter, to in _TO.items()},
    **{f"mlp.{layer}": f"ff.{linear}" for layer, linear in _MLP.items()},
    "modCX.1": "norm1.linear",
}
_ENDS: Names = {
    "init_x_linear": "pos_embed.proj",
    "cond_seq_linear": "context_embedder",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "final_linear": "proj_out",
}
_EMBEDDERS = ("init_x_linear", "cond_seq_linear", "t_embedder")
_ROOTS = {
    **dict.fromkeys(("double_layers", "joint_transformer_blocks"), "D"),
    **dict.fromkeys(("single_layers", "single_transformer_blocks"), "S"),
    **dict.fromkeys((*_EMBEDDERS, "pos_embed", "context_embedder", "time_step_proj"), "IN"),
    **dict.fromkeys(("final_linear", "modF", "proj_out", "norm_out"), "OUT"),
}


def _blocks() -> Iterator[ModuleName]:
    for i in range(_JOINT):
        here, there = f"joint_transformer_blocks.{i}.", f"double_layers.{i}."
        yield from named(_JOINT_BLOCK, here=here, there=there)
    for i in range(_SINGLE):
        here, there = f"single_transformer_blocks.{i}.", f"single_layers.{i}."
        yield from named(_SINGLE_BLOCK, here=here, there=there)


@cache
def _auraflow() -> tuple[ModuleName, ...]:
    """Make the table.

    Source: diffusers' `convert_auraflow_transformer_checkpoint_to_diffusers`.
    """
    last = ModuleName(module="transformer.norm_out.linear", original="modF.1", swap=True)
    return (*named(_ENDS), last, *_blocks(), *t5("text_encoder", _TEXT_LAYERS))


AURAFLOW = Architecture(
    id="auraflow",
    title="AuraFlow",
    base_model_version="auraflow",
    modelspec="auraflow",
    marks=("aura-flow", "pony-v7"),
    build=_auraflow,
    roots=tuple(_ROOTS),
    kohya_original=False,
    clips={"text_encoder": "pile_t5xl"},
    places={},
    blocks=flux_blocks(("BASE",), _JOINT, _SINGLE),
    block=partial(stack_block, roots=_ROOTS),
    family="auraflow",
)
