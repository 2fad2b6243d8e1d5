"""A LoRA's modules as a dialect names them: q, k and v apart, or fused as in the single file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Dora, Full, Lora
from lorakit.adapters.lora import from_factors
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors
from lorakit.lorafile import LoraFile
from lorakit.names.architectures import Architecture, Part
from lorakit.names.checkpoints import BIAS
from lorakit.names.dialects import joins

Members = Sequence[tuple[str, Part]]


def as_named(lora: LoraFile, dialect: str) -> LoraFile:
    """Return a LoRA with the modules that a dialect has names for, ΔW unchanged.

    Raises:
        AdapterError: an adapter's kind cannot be cut into rows, or joined, without its base.
    """
    return fused(lora) if joins(dialect, lora.architecture) else split(lora)


def is_split(lora: LoraFile) -> bool:
    """Tell whether some module is a part of one that the single file fuses."""
    wholes = _wholes(lora.architecture)
    return any(module.removesuffix(BIAS) in wholes for module in lora.adapters)


def is_fused(lora: LoraFile) -> bool:
    """Tell whether some module is a fused one."""
    return any(parts_of(lora, module) for module in lora.adapters)


def parts_of(lora: LoraFile, module: str) -> tuple[tuple[str, Part], ...]:
    """Return the parts of a fused module, or of its bias, with their rows; none of another."""
    known = {} if lora.architecture is None else lora.architecture.fused
    layer = module.removesuffix(BIAS)
    return tuple((part + module[len(layer) :], rows) for part, rows in known.get(layer, ()))


def split(lora: LoraFile) -> LoraFile:
    """Cut every fused module into its parts: rows of `up`, beside the whole of `down`.

    Raises:
        AdapterError: an adapter's kind cannot be cut into rows without its base.
    """
    if not is_fused(lora):
        return lora
    adapters: dict[str, Adapter] = {}
    for module, adapter in lora.adapters.items():
        members = parts_of(lora, module)
        if not members:
            adapters[module] = adapter
        for part, (start, stop, of) in members:
            unit = _unit(lora.name, module, adapter.shape[0], of)
            adapters[part] = _rows(lora.name, module, adapter, (start * unit, stop * unit))
    return replace(lora, adapters=_ordered(adapters))


def fused(lora: LoraFile) -> LoraFile:
    """Join the parts of every module that the single file fuses; a missing part is zero.

    Parts that share their `down` share it in the whole, others stand in blocks: rank Σr.

    Raises:
        AdapterError: an adapter's kind cannot be joined without its base.
    """
    wholes = _wholes(lora.architecture)
    if not is_split(lora):
        return lora
    adapters: dict[str, Adapter] = {}
    parts: dict[str, dict[str, Adapter]] = {}
    for module, adapter in lora.adapters.items():
        layer = module.removesuffix(BIAS)
        if layer not in wholes:
            adapters[module] = adapter
        else:
            whole = wholes[layer] + module[len(layer) :]
            parts.setdefault(whole, {})[module] = adapter
    for whole, found in parts.items():
        if whole in adapters:
            raise AdapterError(
                f"{lora.name}: {whole} is stored whole and in parts ({', '.join(found)}); delete "
                "one of them, lorakit cannot tell which is meant."
            )
        adapters[whole] = _joined(lora.name, whole, parts_of(lora, whole), found)
    return replace(lora, adapters=_ordered(adapters))


def in_one_form(loras: Sequence[LoraFile]) -> list[LoraFile]:
    """Return LoRAs that agree on what a layer is, whatever their order.

    Where one of them has a fused layer it is fused in all of them; where some kind cannot be joined
    it is in parts in all of them.
    """
    if not any(map(is_fused, loras)) or not any(map(is_split, loras)):
        return list(loras)
    try:
        return [fused(lora) for lora in loras]
    except AdapterError:
        return [split(lora) for lora in loras]


def _ordered(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    return {module: adapters[module] for module in sorted(adapters)}


def _wholes(architecture: Architecture | None) -> dict[str, str]:
    """Return module -> the fused module that the single file holds it in."""
    if architecture is None:
        return {}
    return {
        part: whole
        for whole, members in architecture.fused.items()
        if architecture.original_fused(whole)
        for part, _ in members
    }


def _unit(name: str, module: str, rows: int, of: int) -> int:
    if rows % of:
        raise AdapterError(
            f"{name}: {module} expected a multiple of {of} outputs, found {rows}; it was made for "
            "another model."
        )
    return rows // of


def _rows(name: str, module: str, adapter: Adapter, span: tuple[int, int]) -> Adapter:
    try:
        return adapter.rows(*span)
    except AdapterError as error:
        if adapter.needs_base:
            raise AdapterError(f"{name}: {module} {error}.") from None
    change = adapter.change()
    if isinstance(change, Tensor):
        return Full(diff=change[slice(*span)].reshape(-1, *adapter.shape[1:]).float())
    return from_factors(change, adapter.shape).rows(*span)


def _joined(name: str, whole: str, members: Members, found: Mapping[str, Adapter]) -> Adapter:
    unit = max(
        found[part].shape[0] // (stop - start)
        for part, (start, stop, _) in members
        if part in found
    )
    spans = {part: ((start * unit), (stop * unit)) for part, (start, stop, _) in members}
    odd = [
        part
        for part, adapter in found.items()
        if adapter.shape[0] != spans[part][1] - spans[part][0]
    ]
    if odd:
        raise AdapterError(
            f"{name}: {odd[0]} expected {spans[odd[0]][1] - spans[odd[0]][0]} outputs beside the "
            f"other parts of {whole}, found {found[odd[0]].shape[0]}; they are of different models."
        )
    rows = members[0][1][2] * unit
    ordered = [(spans[part], found[part]) for part, _ in members if part in found]
    kinds = {type(adapter) for _, adapter in ordered}
    doras = [adapter for _, adapter in ordered if isinstance(adapter, Dora)]
    whole_rows = len(doras) == len(members) and {dora.axis for dora in doras} == {"output"}
    if kinds == {Dora} and whole_rows and len({dora.role for dora in doras}) == 1:
        return _joined_doras(doras, rows)
    if any(adapter.needs_base for _, adapter in ordered):
        raise AdapterError(
            f"{name}: {whole} expected parts that join without their base, found "
            f"{', '.join(sorted(adapter.kind for _, adapter in ordered))}; make a plain LoRA of "
            "them first with convert --as lora --against MODEL."
        )
    return _block(ordered, rows)


def _joined_doras(parts: Sequence[Dora], rows: int) -> Dora:
    """Norms are by row, so a DoRA of joined rows is the joined DoRAs."""
    spans = list(pairwise(accumulate((part.shape[0] for part in parts), initial=0)))
    inner = _block(list(zip(spans, [part.inner for part in parts], strict=True)), rows)
    magnitude = torch.cat([part.magnitude.reshape(-1) for part in parts])
    shape = [1 if side == 1 else -1 for side in parts[0].magnitude.shape]
    return replace(parts[0], inner=inner, magnitude=magnitude.reshape(shape))


def _block(parts: Sequence[tuple[tuple[int, int], Adapter]], rows: int) -> Adapter:
    shape = parts[0][1].shape
    changes = [(span, adapter, adapter.change()) for span, adapter in parts]
    if any(isinstance(change, Tensor) for _, _, change in changes):
        whole = torch.zeros(rows, *shape[1:], dtype=torch.float32)
        for span, _, change in changes:
            value = change if isinstance(change, Tensor) else change.up @ change.down
            whole[slice(*span)] = value.float().reshape(-1, *shape[1:])
        return Full(diff=whole)
    loras = [
        (
            span,
            adapter
            if isinstance(adapter, Lora) and adapter.mid is None
            else from_factors(change, adapter.shape),
        )
        for span, adapter, change in changes
        if isinstance(change, Factors)
    ]
    return _shared(loras, rows) or _blocks(loras, rows)


def _shared(parts: Sequence[tuple[tuple[int, int], Lora]], rows: int) -> Lora | None:
    """Join parts that have one `down` and one scale, as those of a fused LoRA have."""
    first = parts[0][1]
    for _, lora in parts[1:]:
        if lora.scale != first.scale or not _same(lora.down, first.down):
            return None
    up = first.up.new_zeros(rows, *first.up.shape[1:])
    for span, lora in parts:
        up[slice(*span)] = lora.up
    return replace(first, up=up)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.device.type == "meta" or torch.equal(a, b)


def _blocks(parts: Sequence[tuple[tuple[int, int], Lora]], rows: int) -> Lora:
    """Stand the parts in blocks; each part's scale goes into its `up` where they differ."""
    ranks = sum(lora.rank for _, lora in parts)
    scales = {lora.scale for _, lora in parts}
    first = parts[0][1]
    dtype = first.up.dtype if len(scales) == 1 else torch.float32
    up = torch.zeros(rows, ranks, *first.up.shape[2:], dtype=dtype, device=first.up.device)
    start = 0
    for span, lora in parts:
        factor = 1.0 if len(scales) == 1 else lora.scale
        up[slice(*span), start : start + lora.rank] = lora.up.to(dtype) * factor
        start += lora.rank
    down = torch.cat([lora.down for _, lora in parts])
    scale = scales.pop() if len(scales) == 1 else 1.0
    return Lora(up=up, down=down, alpha=scale * ranks)
