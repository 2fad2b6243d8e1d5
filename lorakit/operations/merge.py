"""merge: a stack of LoRAs becomes one LoRA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lorakit.compute import Compute
from lorakit.errors import AdapterError, LorakitError, UnmatchedError
from lorakit.fusing import as_named, in_one_form
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, joint_dtype
from lorakit.methods.method import LINEAR, Method
from lorakit.models import Model, open_model
from lorakit.operations.apply import FIRST_LAYERS
from lorakit.operations.mixing import Mix, Part, mix_of
from lorakit.operations.outcome import from_pieces
from lorakit.operations.owners import owners_of
from lorakit.operations.pieces import Piece
from lorakit.operations.remarks import remarks
from lorakit.operations.stack import (
    Stack,
    architecture_of,
    check_architecture,
    flat,
    needs_base,
    parts_of,
    shape_of,
    sum_piece,
    unclaimed,
)
from lorakit.progress import Progress, silent
from lorakit.report import Report
from lorakit.tensorfile.source import TensorSource


def merge(
    stack: Stack,
    *,
    method: Method = LINEAR,
    rule: RankRule | None = None,
    against: TensorSource | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Merge LoRAs into one: Σ strength · ΔW or what a method makes, exactly or cut to a rank.

    LoRA, LoCon, LoHa and LoKr of low rank stay exact; other kinds become dense a module at a time.
    What has no rank, changes of biases and norms, is kept as it is.

    Args:
        stack: (LoRA, strength) pairs; a strength is a number or a `Strength`.
        method: how the ΔW of a module are combined; their signed sum if left out.
        rule: how much to keep; without one the sum of the ranks, cut to the numerical rank.
        against: the model that DoRA and its likes are taken on.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Returns:
        The LoRA, in fp32 factors balanced by √σ, to be stored in the joint dtype of the inputs;
        and the report, a row a module.

    Raises:
        AdapterError: the LoRAs are for different models, or one needs a model to be taken on.
        UnmatchedError: everything cancels, or every strength is zero.

    Source: the sum is the web UI's; kohya's `merge_lora.py` adds factors, which adds cross terms.
    """
    rule = RankRule() if rule is None else rule
    model = None if against is None else open_model(against)
    named, modules = modules_of(stack, method=method)
    mix = mix_of(method, modules, rule=rule)
    pieces, absent = _pieces(named, modules, mix, model)
    merged, report = from_pieces(
        pieces,
        command="merge",
        rule=rule,
        like=model_of(stack),
        compute=compute or Compute.of(),
        progress=progress,
    )
    return merged, replace(
        report,
        dropped=(*absent, *report.dropped),
        unmatched=unclaimed(stack),
        notes=(*report.notes, *remarks(mix.method, modules, merged.adapters)),
    )


def merge_pieces(
    stack: Stack,
    *,
    method: Method = LINEAR,
    rule: RankRule | None = None,
    model: Model | None = None,
    dialect: str | None = None,
) -> tuple[list[Piece], tuple[str, ...]]:
    """Return a piece a module, and the modules that every strength sets to zero.

    Args:
        stack: (LoRA, strength) pairs.
        method: how the ΔW of a module are combined.
        rule: the rank rule of the output; some methods work towards it.
        model: what DoRA and its likes are taken on.
        dialect: whose modules the pieces are, fused or not; the first LoRA's if left out.
    """
    named, modules = modules_of(stack, method=method, dialect=dialect)
    return _pieces(named, modules, mix_of(method, modules, rule=rule or RankRule()), model)


def modules_of(
    stack: Stack, *, method: Method, dialect: str | None = None
) -> tuple[Stack, dict[str, list[Part]]]:
    """Return the stack with layers fused, or not, in all LoRAs alike, and the parts of each layer.

    Args:
        stack: (LoRA, strength) pairs.
        method: what its masks are drawn for, if it draws any.
        dialect: whose modules, fused or not; the first LoRA's if left out. It does not count for a
            method to which it makes a difference.

    Raises:
        LorakitError: the stack is empty.
        AdapterError: the LoRAs are for different models.
    """
    if not stack:
        raise LorakitError("merge needs at least one LoRA, found none; name one or more files.")
    architecture_of(stack)
    owners = () if method.plain else owners_of(stack, random=method.entry.random)
    loras = [lora for lora, _ in stack]
    if method.plain:
        loras = [as_named(lora, dialect or loras[0].dialect) for lora in loras]
    else:
        # q, k and v as one layer are merged otherwise than apart: the first does not decide.
        loras = in_one_form(loras)
    named = [(lora, strength) for lora, (_, strength) in zip(loras, stack, strict=True)]
    return named, parts_of(named, owners)


def _pieces(
    stack: Stack, modules: Mapping[str, Sequence[Part]], mix: Mix, model: Model | None
) -> tuple[list[Piece], tuple[str, ...]]:
    block_of = {module: lora.block(module) for lora, _ in stack for module in lora.adapters}
    pieces = [
        sum_piece(
            module,
            block_of[module],
            parts,
            _base(model, module, parts, stack),
            _shape_in(model, module, parts, stack),
            mix,
        )
        for module, parts in modules.items()
        if parts
    ]
    if not pieces:
        raise UnmatchedError(
            "Every strength is zero, so nothing is left to write; give one LoRA a strength."
        )
    return pieces, tuple(module for module, parts in modules.items() if not parts)


def _shape_in(
    model: Model | None, module: str, parts: Sequence[Part], stack: Stack
) -> tuple[int, ...] | None:
    """Return the shape of the weight in a model; None where there is none.

    Raises:
        AdapterError: a part is for a weight of another shape.
    """
    if model is None or not model.parts(module):
        return None
    there, here = model.shape(module), shape_of(parts)
    # A first layer with more inputs only measures a change: inpainting, depth.
    measured = module.endswith(FIRST_LAYERS) and not needs_base(parts)
    if here is not None and flat(here) != flat(there) and not measured:
        check_architecture(model, stack)
        raise AdapterError(
            f"{model.source.name}: {module} expected a change of {list(there)}, found "
            f"{list(here)}; the LoRA was made for another model."
        )
    return there


def _base(
    model: Model | None, module: str, parts: Sequence[Part], stack: Stack
) -> Callable[[], Tensor] | None:
    """Return what reads the weight that a part needs; None where none does.

    Raises:
        AdapterError: there is no model, or not this weight in it.
    """
    if not needs_base(parts):
        return None
    kind = next(part.adapter.kind for part in parts if part.adapter.needs_base)
    if model is None:
        name = next(lora.name for lora, _ in stack if module in lora.adapters)
        raise AdapterError(
            f"{name}: {module} is {kind}, whose change depends on the weight that it changes; "
            "name the model with --against, or bake the LoRA into it with --into."
        )
    if not model.parts(module):
        raise UnmatchedError(
            f"{model.source.name}: expected a weight of {module}, which is {kind}, found none; "
            "name the model that the LoRA was trained on."
        )
    return lambda: model.weight(module)


def model_of(stack: Stack) -> LoraFile:
    """Return the LoRA that the output is like: the first, in the dtype that holds them all."""
    dtype = joint_dtype(lora.dtype for lora, _ in stack)
    carried = {key: value for lora, _ in reversed(stack) for key, value in lora.carried.items()}
    return replace(stack[0][0], architecture=architecture_of(stack), dtype=dtype, carried=carried)
