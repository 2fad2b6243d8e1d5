"""Wan 2.1 and 2.2, VACE too: diffusers' names and those of the original single file."""

import re
from collections.abc import Iterator, Mapping
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.flux import Names, named, norms
from lorakit.names.t5 import XXL, t5

_TO = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_BLOCK: Names = {
    **{
        f"{there}.{letter}": f"{here}.{to}"
        for there, here in _ATTENTIONS.items()
        for letter, to in _TO.items()
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""`k_img` and `v_img` are of the models that start from an image alone."""
_NORMS = {
    **{
        f"{there}.{norm}": f"{here}.{norm}"
        for there, here in _ATTENTIONS.items()
        for norm in ("norm_q", "norm_k")
    },
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
}
"""Of the three norms of a block only the one before the cross attention has a weight."""
_ENDS: Names = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    **{
        f"{kind}_embedding.{layer}": f"condition_embedder.{kind}_embedder.{linear}"
        for kind in ("time", "text")
        for layer, linear in {0: "linear_1", 2: "linear_2"}.items()
    },
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
_END_NORMS = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_VACE_IN: Names = {"before_proj": "proj_in"}
_VACE_OUT: Names = {"after_proj": "proj_out"}
_EMBEDDERS = ("patch_embedding", "vace_patch_embedding", "condition_embedder", "img_emb")
_TIME = ("time_embedding", "time_projection", "text_embedding")
_ROOTS = {
    "blocks": "B",
    "vace_blocks": "V",
    **dict.fromkeys((*_EMBEDDERS, *_TIME), "IN"),
    **dict.fromkeys(("head", "proj_out", "scale_shift_table"), "OUT"),
}
_PATH = re.compile(r"\w+\.(?P<root>[^.]+)(?:\.(?P<number>\d+)\.)?")


def stack_blocks(depth: int) -> tuple[str, ...]:
    """Return the block ids of a single stack: BASE, IN, B00…, OUT."""
    return ("BASE", "IN", *(f"B{i:02}" for i in range(depth)), "OUT")


def stack_block(module: str, *, roots: Mapping[str, str]) -> str:
    """Return the block id of a module by the first word of its path.

    Args:
        module: canonical name, fused or not.
        roots: first word -> block id, or the letter of a stack whose blocks are numbered.
    """
    found = _PATH.match(module)
    kind = roots.get(found["root"], "OTHER") if found else "OTHER"
    if found is None or len(kind) > 1:
        return kind
    return f"{kind}{int(found['number']):02}" if found["number"] else "OTHER"


def _block(module: str, *, stride: int) -> str:
    """Return the block id of a module; a VACE block has that of the block that it steers."""
    block = stack_block(module, roots=_ROOTS)
    return f"B{int(block[1:]) * stride:02}" if block.startswith("V") else block


def _blocks(stack: str, depth: int) -> Iterator[ModuleName]:
    for i in range(depth):
        place = f"{stack}.{i}."
        yield from named(_BLOCK, here=place, there=place)
        yield from norms(_NORMS, here=place, there=place, parameter=".weight")
        yield _modulation(here=place, there=place)


def _modulation(*, here: str, there: str) -> ModuleName:
    """Return the shifts and scales that a block, or the last layer, learns beside those of time."""
    return ModuleName(
        module=f"transformer.{here}scale_shift_table",
        original=f"{there}modulation",
        norm=True,
        bare=True,
    )


def _vace(depth: int) -> Iterator[ModuleName]:
    """Yield what VACE adds: a block's output each, and the input of the first."""
    yield from _blocks("vace_blocks", depth)
    for i in range(depth):
        names = {**_VACE_OUT, **(_VACE_IN if i == 0 else {})}
        yield from named(names, here=f"vace_blocks.{i}.", there=f"vace_blocks.{i}.")


@cache
def _wan(depth: int, *, stride: int) -> tuple[ModuleName, ...]:
    """Make the table of one size.

    Args:
        depth: of the model.
        stride: blocks for each block of VACE.

    Source: diffusers' `convert_wan_transformer_to_diffusers`.
    """
    return (
        *named(_ENDS),
        *norms(_END_NORMS, here="", there="", parameter=".weight"),
        _modulation(here="", there="head."),
        *_blocks("blocks", depth),
        *_vace(depth // stride),
        *t5("text_encoder", XXL),
    )


def _architecture(name: str, title: str, *, depth: int, width: int, stride: int) -> Architecture:
    return Architecture(
        id=name,
        title=title,
        base_model_version="wan",
        modelspec="wan2.1",
        build=partial(_wan, depth, stride=stride),
        roots=tuple(_ROOTS),
        widths=dict.fromkeys(("to_q", "self_attn_q"), width),
        kohya_original=True,
        clips={"text_encoder": "umt5xxl"},
        places={},
        blocks=stack_blocks(depth),
        block=partial(_block, stride=stride),
        family="wan",
    )


# The 5B of Wan 2.2 has the names of the 1.3B, and a width of its own.
WAN_SMALL = _architecture("wan-small", "Wan 2.1 1.3B and 2.2 5B", depth=30, width=1536, stride=2)
WAN = _architecture("wan", "Wan 2.1 and 2.2 14B", depth=40, width=5120, stride=5)
