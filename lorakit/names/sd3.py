"""Stable Diffusion 3 and 3.5: diffusers' names and those of the original single file."""

import re
from collections.abc import Iterator
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.clip import clip
from lorakit.names.flux import ADD_QKV, TO_QKV, Names, final_modulation, named, norms
from lorakit.names.t5 import XXL, t5

_NAMES: Names = {
    "x_block.attn.qkv": TO_QKV,
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": ADD_QKV,
}
_DUAL: Names = {
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
}
_TEXT_OUT: Names = {
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
"""What the last block lacks, whose text nobody reads; its modulation has only shift and scale."""
_NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
_DUAL_NORMS = {"x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k"}
_ENDS: Names = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **{
        f"{there}_embedder.mlp.{layer}": f"time_text_embed.{here}_embedder.{linear}"
        for there, here in {"t": "timestep", "y": "text"}.items()
        for layer, linear in {0: "linear_1", 2: "linear_2"}.items()
    },
    "final_layer.linear": "proj_out",
}
_ROOTS = (
    *("joint_blocks", "transformer_blocks", "context_embedder", "x_embedder", "pos_embed"),
    *("t_embedder", "y_embedder", "time_text_embed", "final_layer", "norm_out", "proj_out"),
)
_BLOCK = re.compile(r"transformer\.(?:joint|transformer)_blocks\.(?P<number>\d+)\.")
_IN = tuple(f"transformer.{root}" for root in ("pos_embed", "context_embedder", "time_text_embed"))
_OUT = ("transformer.norm_out.", "transformer.proj_out")


@cache
def _sd3(depth: int, *, dual: bool) -> tuple[ModuleName, ...]:
    return (
        *named(_ENDS),
        final_modulation(),
        *_blocks(depth, dual=dual),
        *clip("text_encoder", 12),
        *clip("text_encoder_2", 32),
        *t5("text_encoder_3", XXL),
    )


def _blocks(depth: int, *, dual: bool) -> Iterator[ModuleName]:
    """Yield the modules of all blocks.

    Args:
        depth: of the model.
        dual: whether blocks may have a second attention; which of them do, the file tells.

    Source: diffusers' `convert_sd3_transformer_checkpoint_to_diffusers`.
    """
    names: Names = {**_NAMES, **(_DUAL if dual else {})}
    all_norms = {**_NORMS, **(_DUAL_NORMS if dual else {})}
    for i in range(depth):
        here, there = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        yield from named(names, here=here, there=there)
        yield from norms(all_norms, here=here, there=there, parameter=".weight")
        if i < depth - 1:
            yield from named(_TEXT_OUT, here=here, there=there)
    yield ModuleName(
        module=f"transformer.{here}norm1_context.linear",
        original=f"{there}context_block.adaLN_modulation.1",
        swap=True,
    )


def _block_ids(depth: int) -> tuple[str, ...]:
    """Return the block ids of an SD 3.

    Source: traintrain's list of 29 for SD 3.5 medium.
    """
    return ("CLIPG", "CLIPL", "T5", "IN", *(f"J{i:02}" for i in range(depth)), "OUT")


def _block(module: str) -> str:
    """Return the block id of a module; IN are the embedders, OUT is the final layer."""
    if found := _BLOCK.match(module):
        return f"J{int(found['number']):02}"
    if module.startswith(_OUT):
        return "OUT"
    return "IN" if module.startswith(_IN) else "OTHER"


def _architecture(
    name: str, title: str, *, sizes: tuple[str, ...], depth: int, width: int, dual: bool
) -> Architecture:
    """Make one size; `sizes` are kohya's name of it and others'."""
    return Architecture(
        id=name,
        title=title,
        base_model_version=sizes[0],
        modelspec=f"stable-diffusion-{sizes[0]}",
        marks=sizes[1:],
        build=partial(_sd3, depth, dual=dual),
        roots=_ROOTS,
        widths={"to_q": width, "qkv": width},
        kohya_original=True,
        clips={"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
        places={},
        blocks=_block_ids(depth),
        block=_block,
        text_blocks={"text_encoder": "CLIPL", "text_encoder_2": "CLIPG", "text_encoder_3": "T5"},
        family="sd3",
    )


# No model has a second attention in all its blocks, but which ones do is no name's business.
SD3 = _architecture(
    "sd3",
    "Stable Diffusion 3 and 3.5 medium",
    sizes=("3-5-medium", "3.5-medium", "3-medium"),
    depth=24,
    width=1536,
    dual=True,
)
SD3_LARGE = _architecture(
    "sd3-large",
    "Stable Diffusion 3.5 large",
    sizes=("3-5-large", "3.5-large"),
    depth=38,
    width=2432,
    dual=False,
)
