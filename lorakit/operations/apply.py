"""apply: a model with a stack of LoRAs baked in, as a source of tensors."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorakit.adapters import Ia3
from lorakit.compute import Compute
from lorakit.errors import AdapterError, UnmatchedError
from lorakit.fusing import in_one_form, is_split, split
from lorakit.fusing import parts_of as members
from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Change
from lorakit.methods.method import LINEAR, Method
from lorakit.models import Addend, Applied, Model, Slot, open_model
from lorakit.names.architectures import component_of
from lorakit.names.checkpoints import BIAS
from lorakit.names.spelling import DENOISERS, TEXT_ENCODERS
from lorakit.operations.mixing import Mix, Part, mix_of
from lorakit.operations.owners import owners_of
from lorakit.operations.remarks import remarks
from lorakit.operations.stack import (
    Stack,
    check_architecture,
    flat,
    is_dense,
    needs_base,
    parts_of,
    shape_of,
    unclaimed,
    whole,
)
from lorakit.report import Report, Row, name_some
from lorakit.tensorfile.source import TensorSource

_COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
FIRST_LAYERS = ("conv_in", "x_embedder", "pos_embed.proj", "patch_embedding", "img_in")
"""Layers that some models of an architecture have with more inputs: a mask, a picture, a depth."""


def apply(
    base: TensorSource,
    stack: Stack,
    *,
    method: Method = LINEAR,
    allow_unmatched: bool = False,
    compute: Compute | None = None,
) -> tuple[Applied, Report]:
    """Add a merged ΔW to a model, on paper: nothing is computed until a tensor is asked for.

    Args:
        base: the model: any source, also one that `apply` made.
        stack: (LoRA, strength) pairs; a strength is a number or a `Strength`.
        method: how the ΔW of a module are combined; their signed sum if left out.
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
    owners = () if method.plain else owners_of(stack, random=method.entry.random)
    if not method.plain:
        loras = in_one_form([lora for lora, _ in stack])
        stack = [(lora, strength) for lora, (_, strength) in zip(loras, stack, strict=True)]
    stack = _with_biases(model, _as_stored(model, stack))
    addends: dict[str, tuple[Addend, ...]] = {}
    rows: list[Row] = []
    unmatched: list[str] = []
    block_of = {module: lora.block(module) for lora, _ in stack for module in lora.adapters}
    modules = parts_of(stack, owners)
    mix = mix_of(method, modules)
    for module, parts in modules.items():
        slot = model.slot(module)
        if slot is None:
            unmatched.append(module)
        elif parts:
            addend, note = _addend(model, stack, module, slot, parts, mix)
            addends[slot.key] = (*addends.get(slot.key, ()), addend)
            ranks = [p.adapter.rank for p in parts if p.adapter.rank is not None]
            rank = sum(ranks) if ranks else None
            rows.append(
                Row(module=module, block=block_of[module], rank_before=rank, note=slot.key + note)
            )
    if unmatched:
        check_architecture(model, stack)
    _check_matched(model, unmatched, allow_unmatched, any_left=bool(rows))
    device = (compute or Compute()).device
    applied = Applied(
        base=model.source,
        addends=addends,
        metadata=dict(model.source.metadata),
        device=device,
    )
    return applied, Report(
        command="merge",
        rows=tuple(rows),
        unmatched=(*unmatched, *unclaimed(stack)),
        notes=(*_notes(stack), *remarks(mix.method, modules)),
    )


def _notes(stack: Stack) -> tuple[str, ...]:
    carried = sorted({key.split(".")[1] for lora, _ in stack for key in lora.carried})
    if not carried:
        return ()
    return (
        f"{len(carried)} textual inversions ({name_some(carried)}) have no place in a checkpoint; "
        "they stay with the LoRA.",
    )


def _as_stored(model: Model, stack: Stack) -> Stack:
    """Cut fused modules into parts where the model holds them apart, or another LoRA names them."""
    cut = any(is_split(lora) for lora, _ in stack)
    for lora, _ in stack:
        apart = (m for m in lora.adapters if members(lora, m) and model.slot(m) is None)
        cut = cut or any(apart)
    return tuple((split(lora), strength) for lora, strength in stack) if cut else stack


def _with_biases(model: Model, stack: Stack) -> Stack:
    """Let PEFT's IA3 of outputs scale the bias too: it scales what a layer gives."""
    found = []
    for lora, strength in stack:
        biases = {
            module + BIAS: adapter
            for module, adapter in lora.adapters.items()
            if isinstance(adapter, Ia3) and adapter.peft and not adapter.on_input
            if model.slot(module + BIAS) is not None
        }
        found.append((replace(lora, adapters={**lora.adapters, **biases}), strength))
    return tuple(found)


def _addend(
    model: Model, stack: Stack, module: str, slot: Slot, parts: Sequence[Part], mix: Mix
) -> tuple[Addend, str]:
    shape = shape_of(parts) or slot.shape
    wanted = _missing_inputs(module, slot, parts)
    if not wanted:
        _check_shape(model, stack, module, slot, parts)

    def change(base: Tensor | None) -> Change:
        found = mix.of(module, parts, base, conv=math.prod(shape[2:]) > 1)
        return widened(whole(found), shape, wanted) if wanted else found

    addend = Addend(
        rows=slot.rows,
        transpose=slot.transpose,
        swap=slot.swap,
        needs_base=needs_base(parts),
        dense=is_dense(parts),
        change=change,
    )
    note = f", {shape[1]} of its {wanted} inputs" if wanted else ""
    return addend, note


def _missing_inputs(module: str, slot: Slot, parts: Sequence[Part]) -> int:
    """Return how many inputs a first layer has where the LoRA's has fewer: inpainting, depth."""
    shape = shape_of(parts) or slot.shape
    grown = len(shape) == len(slot.shape) > 1 and slot.shape[1] > shape[1]
    same = grown and (shape[0], *shape[2:]) == (slot.shape[0], *slot.shape[2:])
    return slot.shape[1] if same and module.endswith(FIRST_LAYERS) else 0


def widened(change: Factors | Tensor, shape: tuple[int, ...], inputs: int) -> Factors | Tensor:
    """Return ΔW with zeros for the inputs that it does not know.

    Args:
        change: ΔW of `shape`, flattened to [out, in · kh · kw].
        shape: (out, in) or (out, in, kh, kw).
        inputs: how many inputs the layer has.

    Source: the web UI, which pads so for inpainting models.
    """
    matrix = change if isinstance(change, Tensor) else change.down
    kernels = matrix.reshape(len(matrix), *shape[1:])
    wide = kernels.new_zeros(len(matrix), inputs, *shape[2:])
    wide[:, : shape[1]] = kernels
    flattened = wide.flatten(1)
    return flattened if isinstance(change, Tensor) else Factors(up=change.up, down=flattened)


def _check_shape(
    model: Model, stack: Stack, module: str, slot: Slot, parts: Sequence[Part]
) -> None:
    sides = [part.adapter.shape for part in parts if 0 in part.adapter.shape]
    odd = [s for s in sides if s[0] not in (0, slot.shape[0]) or s[1] not in (0, *slot.shape[1:2])]
    shape = odd[0] if odd else shape_of(parts) or slot.shape
    if flat(slot.shape) != flat(shape) or math.prod(slot.shape) != math.prod(shape):
        check_architecture(model, stack)
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
    raise UnmatchedError(
        f"{name}: {len(unmatched)} layers of the LoRA have no place in this model: "
        f"{name_some(unmatched)} ({_why(model, unmatched)}); use --allow-unmatched to leave them "
        "out."
    )


def _why(model: Model, unmatched: Sequence[str]) -> str:
    """Say why a model lacks layers, or what is closest to them there."""
    if any(module.endswith("lm_head") for module in unmatched):
        return "it ties lm_head to its embedding, which is stored once; untie them first"
    found = sorted({component_of(m) for m in unmatched if m.startswith(_COMPONENTS)})
    absent = [component for component in found if not model.index.has_component(component)]
    if absent:
        return f"it has no {' and no '.join(absent)}"
    near = (close for m in unmatched[:3] for close in model.index.suggestions(m))
    return f"closest there: {name_some(near, limit=3)}"
