"""apply: a model with a stack of LoRAs baked in, as a source of tensors."""

import math
from collections.abc import Sequence

from lorakit.compute import Compute
from lorakit.errors import AdapterError, UnmatchedError
from lorakit.models import Addend, Applied, Model, Slot, open_model
from lorakit.operations.stack import Part, Stack, architecture_of, flat, parts_of, total, unclaimed
from lorakit.report import Report, Row, name_some
from lorakit.tensorfile.source import TensorSource


def apply(
    base: TensorSource,
    stack: Stack,
    *,
    allow_unmatched: bool = False,
    compute: Compute | None = None,
) -> tuple[Applied, Report]:
    """Add Σ strength · ΔW to a model, on paper: nothing is computed until a tensor is asked for.

    Args:
        base: the model: any source, also one that `apply` made.
        stack: (LoRA, strength) pairs; a strength is a number or a `Strength`.
        allow_unmatched: leave out, and list in the report, the layers that the model lacks.
        compute: the device of the sums.

    Returns:
        A source with the base's specs whose `get` adds ΔW, and the report, a row a layer.

    Raises:
        UnmatchedError: a layer of a LoRA has no place in the model.
        AdapterError: the LoRA is for another architecture, or a layer has another shape.

    Source: the web UI's sum; supermerger adds one LoRA after another and rounds each time.
    """
    model = open_model(base)
    _check_architecture(model, stack)
    addends: dict[str, tuple[Addend, ...]] = {}
    rows: list[Row] = []
    unmatched: list[str] = []
    block_of = {module: lora.block(module) for lora, _ in stack for module in lora.adapters}
    for module, parts in parts_of(stack).items():
        slot = model.slot(module)
        if slot is None:
            unmatched.append(module)
        elif parts:
            _check_shape(model, module, slot, parts)
            addends[slot.key] = (*addends.get(slot.key, ()), _addend(slot, parts))
            rank = sum(adapter.rank for adapter, _ in parts)
            rows.append(Row(module=module, block=block_of[module], rank_before=rank, note=slot.key))
    _check_matched(model, unmatched, allow_unmatched, any_left=bool(rows))
    device = (compute or Compute()).device
    applied = Applied(base=base, addends=addends, metadata=dict(base.metadata), device=device)
    return applied, Report(
        command="merge", rows=tuple(rows), unmatched=(*unmatched, *unclaimed(stack))
    )


def _addend(slot: Slot, parts: Sequence[Part]) -> Addend:
    return Addend(
        rows=slot.rows,
        transpose=slot.transpose,
        factors=lambda: total(parts),
    )


def _check_architecture(model: Model, stack: Stack) -> None:
    ours, theirs = model.index.architecture, architecture_of(stack)
    if ours is not None and theirs is not None and ours.id != theirs.id:
        raise AdapterError(
            f"{model.source.name}: expected a model for {theirs.title}, as {stack[0][0].name} "
            f"needs, found {ours.title}; choose a base of the LoRA's architecture."
        )


def _check_shape(model: Model, module: str, slot: Slot, parts: Sequence[Part]) -> None:
    shape = parts[0][0].shape
    if flat(slot.shape) != flat(shape) or math.prod(slot.shape) != math.prod(shape):
        raise AdapterError(
            f"{model.source.name}: {module} ({slot.key}) expected a change of {list(slot.shape)}, "
            f"found {list(shape)}; the LoRA was made for another model."
        )


def _check_matched(
    model: Model, unmatched: Sequence[str], allowed: bool, *, any_left: bool
) -> None:
    if not unmatched and any_left:
        return
    name = model.source.name
    if not any_left:
        raise UnmatchedError(
            f"{name}: none of the LoRA's layers has a place in this model "
            f"({name_some(unmatched) or 'every strength is zero'}); is it the right model?"
        )
    if allowed:
        return
    components = sorted({module.partition(".")[0] for module in unmatched})
    absent = [c for c in components if not model.index.has_component(c)]
    why = (
        f"it has no {' and no '.join(absent)}"
        if absent
        else "closest there: "
        + name_some(
            (near for module in unmatched[:3] for near in model.index.suggestions(module)), limit=3
        )
    )
    raise UnmatchedError(
        f"{name}: {len(unmatched)} layers of the LoRA have no place in this model: "
        f"{name_some(unmatched)} ({why}); use --allow-unmatched to leave them out."
    )
