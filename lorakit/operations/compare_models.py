"""compare: how the weights of several models lie to each other, a tensor at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, NumericsError, SpecError, UnmatchedError
from lorakit.linalg.overlap import Angles
from lorakit.linalg.tiles import BLOCK, distance
from lorakit.methods.conflict import Conflict, conflict_of, summed_conflict
from lorakit.models import Model, open_model
from lorakit.names.blocks import block_of
from lorakit.names.generic import generic
from lorakit.operations.comparison import Comparison
from lorakit.operations.stack import flat
from lorakit.operations.tally import Layer, Subject, summed
from lorakit.progress import Progress, silent
from lorakit.report import name_some
from lorakit.tensorfile.source import TensorSource

_BITS = {"F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
"""Binary digits of a float of these dtypes, the first one included."""


def compare_models(
    sources: Sequence[TensorSource],
    *,
    names: Sequence[str] | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare models: two by their weights, more by how they differ from the first.

    These tell whether one is a weighted sum of the others, whichever comes first. Layers that a
    LoRA can change are compared, every element of them, in blocks of rows; what else differs is
    counted and named in the notes.

    Args:
        sources: two models or more.
        names: what to call them; the sources' own names if left out.
        compute: workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        SpecError: there are less than two models.
        AdapterError: they are of different architectures.
        UnmatchedError: they have no layer in common.
        NumericsError: a weight holds NaN or infinity.
    """
    if len(sources) < 2:
        raise SpecError(f"compare needs two models or more, found {len(sources)}; name another.")
    compute = compute or Compute.of()
    models = [open_model(source) for source in sources]
    called = tuple(names or (model.source.name for model in models))
    _check(models)
    shared, held = _shared(models)
    layers = []
    jobs = ordered_map(
        partial(_measured, models),
        shared,
        compute=compute,
        cost=lambda module: 8 * len(models) * _numel(models[0], module),
    )
    for layer in jobs:
        layers.append(layer)
        progress("layers", len(layers), len(shared))
    others = _others(models, compute=compute, progress=progress)
    changes = len(models) > 2
    base = (f"The changes from {called[0]}, the first model, are compared.",) if changes else ()
    alone = tuple(len(modules) - len(shared) for modules in held)
    subject = Subject(
        kind="changes" if changes else "models",
        names=called[1:] if changes else called,
        base=called[0] if changes else None,
        alone=alone[1:] if changes else alone,
        order=(models[0].index.architecture or generic(shared)).blocks,
        notes=(*base, *_odd(models, held, called), *_told(others)),
        others=None if others is None else len(others),
    )
    return summed(subject, layers)


def _check(models: Sequence[Model]) -> None:
    known = [m for m in models if m.index.architecture is not None]
    for model in known[1:]:
        ours, theirs = known[0].index.architecture, model.index.architecture
        if ours is not None and theirs is not None and ours.kin != theirs.kin:
            raise AdapterError(
                f"{model.source.name}: expected a model for {ours.title} as "
                f"{known[0].source.name} is, found {theirs.title}; compare models of one kind."
            )


def _shared(models: Sequence[Model]) -> tuple[list[str], list[frozenset[str]]]:
    """Return the layers that all models have in one shape, and those of each.

    Raises:
        UnmatchedError: there is none.
    """
    held = [frozenset(m for m in model.index.layers if model.parts(m)) for model in models]
    both = sorted(frozenset.intersection(*held))
    shared = [m for m in both if len({flat(model.shape(m)) for model in models}) == 1]
    if not shared:
        raise UnmatchedError("These models have no layer in common; are they of one architecture?")
    return shared, held


def _odd(
    models: Sequence[Model], held: Sequence[frozenset[str]], called: Sequence[str]
) -> tuple[str, ...]:
    """Name the layers that are not compared: not all models have them, or in another shape."""
    both = frozenset.intersection(*held)
    single = {name: sorted(own - both) for name, own in zip(called, held, strict=True)}
    notes = [
        f"{len(alone)} layers of {name} are not in all models: {name_some(alone)}."
        for name, alone in single.items()
        if alone
    ]
    shapes = [m for m in sorted(both) if len({flat(model.shape(m)) for model in models}) > 1]
    if shapes:
        notes.append(f"{len(shapes)} layers differ in shape: {name_some(shapes)}.")
    return tuple(notes)


def _numel(model: Model, module: str) -> int:
    return int(torch.Size(model.shape(module)).numel())


def _measured(models: Sequence[Model], module: str) -> Layer:
    weights = [model.stored(module) for model in models]
    step = max(1, BLOCK // max(1, weights[0].shape[1]))
    starts = range(0, len(weights[0]), step)
    parts = [_block([weight[start : start + step] for weight in weights]) for start in starts]
    none = torch.zeros(0, 0, dtype=torch.float64)
    squares = torch.stack([part.squares for part in parts]).sum(dim=0)
    for model, square in zip(models, squares.tolist(), strict=True):
        if not math.isfinite(square):
            raise NumericsError(
                f"{model.source.name}: {module} holds NaN or infinity, so that nothing can be said "
                "of it; lorakit verify names all such tensors."
            )
    return Layer(
        module=module,
        block=block_of(module, models[0].index.architecture),
        angles=Angles(
            gram=torch.stack([part.gram for part in parts]).sum(dim=0),
            apart=torch.stack([part.apart for part in parts]).sum(dim=0),
            overlap=none,
            chance=none,
            best=none,
        ),
        conflict=summed_conflict([part.conflict for part in parts]),
        noise=_noise(models, module, squares),
    )


def _noise(models: Sequence[Model], module: str, squares: Tensor) -> tuple[float, ...]:
    """Return the squared error that the rounding to its stored dtype left in each weight.

    Args:
        models: of which the weights are.
        module: which layer.
        squares: ‖W‖² of each, [T].

    Source: a number between two powers of two is off by 2^-p / √12 of the lower one at p bits
    after it; over weights of a bell curve that is 0.39 · 2^-p of their norm, p counting the first.
    """
    slots = [model.slot(module) for model in models]
    dtypes = [
        "" if slot is None else model.source.specs[slot.key].dtype
        for model, slot in zip(models, slots, strict=True)
    ]
    shares = [(0.39 * 2.0 ** -_BITS.get(dtype, 24)) ** 2 for dtype in dtypes]
    return tuple(share * square for share, square in zip(shares, squares.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Sums over some rows of a layer: of two models themselves, of more by their changes.

    `squares` are ‖W‖² of every model, [T].
    """

    gram: Tensor
    apart: Tensor
    conflict: Conflict
    squares: Tensor


def _block(weights: Sequence[Tensor]) -> _Part:
    rows = torch.stack([weight.double().flatten() for weight in weights])
    squares = rows.square().sum(dim=1)
    if len(weights) > 2:
        rows = rows[1:] - rows[0]
    apart = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, j in combinations(range(len(rows)), 2):
        apart[i, j] = apart[j, i] = torch.linalg.vector_norm(rows[i] - rows[j]) ** 2
    return _Part(gram=rows @ rows.T, apart=apart, conflict=conflict_of(rows), squares=squares)


def _others(
    models: Sequence[Model], *, compute: Compute, progress: Progress
) -> tuple[str, ...] | None:
    """Return the tensors beside the layers that differ between models, or that only some have.

    None where they cannot be compared by name, as the models are in different layouts.
    """
    if len({model.index.layout for model in models}) > 1:
        return None
    used = {slot.key for model in models for m in model.index.layers if (slot := model.slot(m))}
    keys = sorted({key for model in models for key in model.source.specs}.difference(used))
    jobs = ordered_map(
        partial(_differs, [model.source for model in models]),
        keys,
        compute=compute,
        cost=partial(_cost, models),
    )
    found = []
    for done, (key, differs) in enumerate(zip(keys, jobs, strict=True), start=1):
        found += [key] if differs else []
        progress("other tensors", done, len(keys))
    return tuple(found)


def _cost(models: Sequence[Model], key: str) -> int:
    specs = [model.source.specs.get(key) for model in models]
    return 8 * sum(spec.numel for spec in specs if spec is not None)


def _differs(sources: Sequence[TensorSource], key: str) -> bool:
    specs = [source.specs.get(key) for source in sources]
    if len({None if spec is None else spec.shape for spec in specs}) > 1:
        return True
    first, *rest = [source.get(key) for source in sources]
    return any(not _equal(first, other) for other in rest)


def _equal(first: Tensor, other: Tensor) -> bool:
    if first.is_floating_point() and other.is_floating_point():
        one, two = (t.reshape(len(t) if t.ndim else 1, -1) for t in (first, other))
        return not one.numel() or distance(one, two) == 0.0
    return torch.equal(first, other)


def _told(others: tuple[str, ...] | None) -> tuple[str, ...]:
    if others is None:
        return ("The models are in different layouts: norms and biases were not compared.",)
    if not others:
        return ()
    return (f"{len(others)} tensors beside the layers differ too: {name_some(others)}.",)
