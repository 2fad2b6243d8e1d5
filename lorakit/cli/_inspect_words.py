"""What inspect found, in sentences."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorakit.cli._measures import TEXT_ENCODERS, short_kinds
from lorakit.cli._recipe_words import listed
from lorakit.cli._render import bytes_text
from lorakit.report import name_some

if TYPE_CHECKING:
    from lorakit.operations.inspection import Group, Inspection

_KINDS = {
    "lora": "LoRA",
    "locon": "LoCon",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "dora": "DoRA",
    "oft": "OFT",
    "ia3": "IA3",
    "full": "full difference",
    "bias": "bias",
}
_PARTS = {"unet": "the UNet", "transformer": "the transformer"}
_PARTS |= dict.fromkeys(("model", "base_model"), "the model")
_COUNTS = ("no", "one", "two", "three")
_NAMED = 3
"""So many of the largest blocks and kinds are named."""
_FAINT = 0.05
"""A smaller share of the change is not named."""


def summary(found: "Inspection") -> tuple[str, ...]:
    """Say what a file is, where it acts, how large that is, and which rank it needs."""
    if found.kind == "checkpoint":
        return (_checkpoint(found),)
    sentences = (_what(found), _where(found), _how_much(found), _rank(found))
    return tuple(sentence for sentence in sentences if sentence)


def _checkpoint(found: "Inspection") -> str:
    for_ = f" of {found.architecture}" if found.architecture else " of an unknown architecture"
    dtypes = " and ".join(found.dtypes)
    return (
        f"A checkpoint{for_} in the {found.layout} layout: {found.tensors} tensors, {dtypes}, "
        f"{bytes_text(found.nbytes)}."
    )


def _what(found: "Inspection") -> str:
    for_ = f" for {found.architecture}" if found.architecture else " for an unknown architecture"
    scales = ", ".join(part for part in (_ranks(found.ranks), _alphas(found)) if part)
    where = listed(_components(found.components))
    return f"A {_kind(found.adapters)}{for_}: {where}{', ' + scales if scales else ''}."


def _kind(adapters: Mapping[str, int]) -> str:
    if adapters.keys() == {"lora", "locon"}:
        return "LoRA with 3x3 convolutions"
    names = [_KINDS.get(kind, kind) for kind in adapters]
    return names[0] if len(names) == 1 else f"mixture of {listed(names)}"


def _components(components: Mapping[str, int]) -> list[str]:
    texts = [count for name, count in components.items() if name.startswith(TEXT_ENCODERS)]
    others = [
        f"{count} {'layer' if count == 1 else 'layers'} of {_PARTS.get(name, name)}"
        for name, count in components.items()
        if not name.startswith(TEXT_ENCODERS)
    ]
    if not texts:
        return others
    count = _COUNTS[len(texts)] if len(texts) < len(_COUNTS) else str(len(texts))
    encoders = "the text encoder" if len(texts) == 1 else f"{count} text encoders"
    return [*others, f"{sum(texts)}{'' if others else ' layers'} of {encoders}"]


def _ranks(ranks: Mapping[str, int]) -> str:
    known = sorted(int(rank) for rank in ranks if rank.isdigit())
    if not known:
        return ""
    if len(known) == 1:
        return f"rank {known[0]}"
    return f"ranks {known[0]} to {known[-1]}"


def _alphas(found: "Inspection") -> str:
    alphas = [alpha for alpha in found.alphas if re.fullmatch(r"-?[\d.]+", alpha)]
    ranks = [rank for rank in found.ranks if rank.isdigit()]
    if len(alphas) == len(ranks) == len(found.alphas) == 1:
        scale = float(alphas[0]) / int(ranks[0]) if int(ranks[0]) else 1.0
        return f"alpha {alphas[0]}" + ("" if scale == 1 else f" (scale {scale:.3g})")
    return ""


def _where(found: "Inspection") -> str:
    if not found.norm:
        return ""
    blocks = _largest(found.blocks, {})
    kinds = _largest(found.kinds, short_kinds(found))
    parts = [listed(named) for named in (blocks, kinds) if named]
    return f"Its change is largest in {', by kind of layer in '.join(parts)}." if parts else ""


def _largest(groups: "Sequence[Group]", names: Mapping[str, str]) -> list[str]:
    """Name those with the largest share; none where there is but one, or all have little."""
    known = [group for group in groups if group.share is not None]
    ranked = sorted(known, key=lambda group: -(group.share or 0.0))
    if len(ranked) < 2:
        return []
    return [
        f"{names.get(group.id, group.id)} ({percent(group.share or 0.0)})"
        for group in ranked[:_NAMED]
        if (group.share or 0.0) >= _FAINT
    ]


def relative(found: "Inspection") -> float | None:
    """Return ‖ΔW‖ / ‖W‖ over all layers that the model has, None where none was named."""
    beside = [(block.norm, block.relative) for block in found.blocks]
    known = [(norm, share) for norm, share in beside if norm and share]
    weights = math.hypot(*(norm / share for norm, share in known))
    return math.hypot(*(norm for norm, _ in known)) / weights if weights else None


def _how_much(found: "Inspection") -> str:
    share = relative(found)
    if share is None or found.against is None:
        return ""
    return (
        f"Its size is {percent(share)} of that of the weights that it changes in "
        f"{file_name(found.against)}."
    )


def percent(share: float) -> str:
    """Write a share in per cent, with as many digits as say something."""
    number = 100 * share
    return f"{number:.0f} %" if number >= 5 else f"{number:.2g} %"


def _rank(found: "Inspection") -> str:
    spectrum = found.spectrum
    if spectrum is None:
        return ""
    total = spectrum.total
    need, most = total.needed["99"], total.rank
    if not need:
        return "It changes nothing, or nothing that has a rank."
    if need < most:
        return f"Rank {need} of {most} keeps 99 % of the change."
    less = total.needed["95"]
    rest = f"; rank {less} keeps 95 %" if less < most else ""
    return f"It needs its whole rank of {most} to keep 99 % of the change{rest}."


def advice(found: "Inspection") -> str:
    """Return the command that cuts a LoRA to the rank that it needs; nothing where it has that."""
    spectrum = found.spectrum
    if spectrum is None or not 0 < spectrum.total.needed["99"] < spectrum.total.rank:
        return ""
    need = spectrum.total.needed["99"]
    stem = file_name(found.path).removesuffix(".safetensors")
    output = _quoted(f"{stem}-rank{need}.safetensors")
    return f"lorakit resize {_quoted(found.path)} --rank {need} -o {output}"


def _quoted(path: str) -> str:
    return path if re.fullmatch(r"[\w./\\:+-]+", path) else f'"{path}"'


def file_name(path: str) -> str:
    """Return a file's name without its folders, whatever system wrote it."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def file_names(found: "Sequence[Inspection]") -> str:
    """Name the first files, without their folders."""
    return name_some((file_name(one.path) for one in found), limit=_NAMED)
