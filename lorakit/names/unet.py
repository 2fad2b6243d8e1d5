"""The UNet of Stable Diffusion: diffusers' names and those of the original single file."""

import re
from collections.abc import Iterator, Sequence

from lorakit.names.architectures import ModuleName

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
}
_RESNET_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_SHORTCUT = {"conv_shortcut": "skip_connection"}
_BLOCK = (
    *(f"{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_LABEL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_RESNETS = 2
"""Resnets of a down level; an up level has one more."""
_STEP = _RESNETS + 1
_3X3 = (".conv1", ".conv2", "samplers.0.conv", "unet.conv_in", "unet.conv_out")
_BLOCK_NORMS = ("norm1", "norm2", "norm3")
ROOTS = (
    *("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out."),
    *("down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding", "conv_in"),
)
"""How the paths of a UNet begin, in both layouts."""
_LEVEL = re.compile(
    r"unet\.(?P<side>down|up)_blocks\.(?P<level>\d+)\."
    r"(?:(?:down|up)samplers\.0|(?:attentions|resnets)\.(?P<index>\d+))\."
)
_FIRST = ("unet.conv_in", "unet.time_embedding", "unet.add_embedding")
_LAST = ("unet.conv_out", "unet.conv_norm_out")


def unet(
    *, widths: Sequence[int], depths: Sequence[int], middle: int, label: bool
) -> Iterator[ModuleName]:
    """Yield the modules of a UNet, its norms too.

    Args:
        widths: of the down levels, as multiples of the first; a resnet has a shortcut where the
            width changes.
        depths: transformer blocks of each down level, 0 where it has no attention.
        middle: transformer blocks of the middle.
        label: whether a label is embedded beside the time (SDXL).

    Source: diffusers' `convert_ldm_unet_checkpoint`.
    """
    yield _norm("conv_norm_out", "out.0")
    last = len(depths) - 1
    for path, original in (_TOP | (_LABEL if label else {})).items():
        yield _name(path, original)
    for level, depth in enumerate(depths):
        wider = level > 0 and widths[level] != widths[level - 1]
        for i in range(_RESNETS):
            place = f"input_blocks.{1 + _STEP * level + i}"
            yield from _pair(f"down_blocks.{level}", i, place, depth, shortcut=wider and i == 0)
        if level < last:
            place = f"input_blocks.{_STEP * (level + 1)}.0.op"
            yield _name(f"down_blocks.{level}.downsamplers.0.conv", place)
    for i in range(2):
        yield from _resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", shortcut=False)
    yield from _attention("mid_block.attentions.0", "middle_block.1", middle)
    for level, depth in enumerate(reversed(depths)):
        for i in range(_RESNETS + 1):
            place = f"output_blocks.{_STEP * level + i}"
            yield from _pair(f"up_blocks.{level}", i, place, depth, shortcut=True)
        if level < last:
            place = f"output_blocks.{_STEP * level + _RESNETS}.{2 if depth else 1}.conv"
            yield _name(f"up_blocks.{level}.upsamplers.0.conv", place)


def _pair(
    block: str, index: int, place: str, depth: int, *, shortcut: bool
) -> Iterator[ModuleName]:
    yield from _resnet(f"{block}.resnets.{index}", f"{place}.0", shortcut=shortcut)
    if depth:
        yield from _attention(f"{block}.attentions.{index}", f"{place}.1", depth)


def _resnet(path: str, place: str, *, shortcut: bool) -> Iterator[ModuleName]:
    for name, original in (_RESNET | (_SHORTCUT if shortcut else {})).items():
        yield _name(f"{path}.{name}", f"{place}.{original}")
    for name, original in _RESNET_NORMS.items():
        yield _norm(f"{path}.{name}", f"{place}.{original}")


def _attention(path: str, place: str, depth: int) -> Iterator[ModuleName]:
    inner = [f"transformer_blocks.{block}.{name}" for block in range(depth) for name in _BLOCK]
    for name in ("proj_in", *inner, "proj_out"):
        yield _name(f"{path}.{name}", f"{place}.{name}")
    norms = [f"transformer_blocks.{b}.{name}" for b in range(depth) for name in _BLOCK_NORMS]
    for name in ("norm", *norms):
        yield _norm(f"{path}.{name}", f"{place}.{name}")


def _name(path: str, original: str) -> ModuleName:
    return ModuleName(module=f"unet.{path}", original=original)


def _norm(path: str, original: str) -> ModuleName:
    return ModuleName(module=f"unet.{path}", original=original, norm=True)


def is_3x3(module: str) -> bool:
    """Tell whether a module is one of a UNet's convolutions with a kernel of 3x3."""
    return module.startswith("unet.") and module.endswith(_3X3)


def unet_blocks(levels: int) -> tuple[str, ...]:
    """Return the block ids of a model with a UNet: BASE, IN00…, MID, OUT00…."""
    ins, outs = ([f"{side}{i:02}" for i in range(_STEP * levels)] for side in ("IN", "OUT"))
    return ("BASE", *ins, "MID", *outs)


def unet_block(module: str, *, levels: int) -> str:
    """Return the block id of a UNet's module.

    The time and label embeddings and the first convolution are IN00, the last convolution is the
    last OUT, as supermerger's checkpoint merge counts them.

    Source: LoRA Block Weight, which leaves these four at weight 1 even under NONE.
    """
    if found := _LEVEL.match(module):
        start = _STEP * int(found["level"])
        index = _RESNETS if found["index"] is None else int(found["index"])
        return f"IN{start + index + 1:02}" if found["side"] == "down" else f"OUT{start + index:02}"
    if module.startswith("unet.mid_block."):
        return "MID"
    if module.startswith(_FIRST):
        return "IN00"
    return f"OUT{_STEP * levels - 1:02}" if module.startswith(_LAST) else "OTHER"
