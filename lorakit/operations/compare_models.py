"""compare: how the weights of several models lie to each other, a tensor at a time."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, SpecError, UnmatchedError
from lorakit.linalg.tiles import BLOCK
from lorakit.models import Model, open_model
from lorakit.names.blocks import block_of
from lorakit.names.generic import generic
from lorakit.operations.compare import Layer, summed
from lorakit.operations.comparison import Comparison
from lorakit.progress import Progress, silent
from lorakit.tensorfile.source import TensorSource


def compare_models(
    sources: Sequence[TensorSource],
    *,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare models: two by their weights, more by how they differ from the first.

    The changes of a fine-tune and of a merge tell whether one is made of the others: the first is
    their common base. Layers that a LoRA can change are compared, in blocks of rows.

    Args:
        sources: two models or more.
        compute: workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        SpecError: there are less than two models.
        AdapterError: they are of different architectures.
        UnmatchedError: they have no layer in common.
    """
    if len(sources) < 2:
        raise SpecError(f"compare needs two models or more, found {len(sources)}; name another.")
    models = [open_model(source) for source in sources]
    _check(models)
    held = [{m for m in model.index.layers if model.parts(m)} for model in models]
    shared = sorted(set.intersection(*held))
    shared = [m for m in shared if len({model.shape(m) for model in models}) == 1]
    if not shared:
        raise UnmatchedError("These models have no layer in common; are they of one architecture?")
    layers = []
    jobs = ordered_map(
        partial(_measured, models),
        shared,
        compute=compute or Compute.of(),
        cost=lambda module: 8 * len(models) * _numel(models[0], module),
    )
    for done, layer in enumerate(jobs, start=1):
        layers.append(layer)
        progress("layers", done, len(shared))
    names = tuple(model.source.name for model in models)
    changes = len(models) > 2
    architecture = models[0].index.architecture or generic(shared)
    only_in = {n: len(h) - len(shared) for n, h in zip(names, held, strict=True)}
    return summed(
        "changes" if changes else "models",
        names[1:] if changes else names,
        layers,
        order=architecture.blocks,
        only_in={n: c for n, c in only_in.items() if c and n in (names[1:] if changes else names)},
        notes=(f"Changes from {names[0]}, the first model, are compared.",) if changes else (),
    )


def _check(models: Sequence[Model]) -> None:
    known = [m for m in models if m.index.architecture is not None]
    for model in known[1:]:
        ours, theirs = known[0].index.architecture, model.index.architecture
        if ours is not None and theirs is not None and ours.kin != theirs.kin:
            raise AdapterError(
                f"{model.source.name}: expected a model for {ours.title} as "
                f"{known[0].source.name} is, found {theirs.title}; compare models of one kind."
            )


def _numel(model: Model, module: str) -> int:
    return int(torch.Size(model.shape(module)).numel())


def _measured(models: Sequence[Model], module: str) -> Layer:
    weights = [model.stored(module) for model in models]
    count = len(models) - 1 if len(models) > 2 else 2
    gram = torch.zeros(count, count, dtype=torch.float64)
    step = max(1, BLOCK // max(1, weights[0].shape[1]))
    agree, both = torch.zeros_like(gram), torch.zeros_like(gram)
    for start in range(0, len(weights[0]), step):
        rows = torch.stack([w[start : start + step].double().flatten() for w in weights])
        if count < len(models):
            rows = rows[1:] - rows[0]
        gram += rows @ rows.T
        signs = rows.sign()
        agree += signs @ signs.T
        both += signs.abs() @ signs.abs().T
    none: Tensor = torch.zeros_like(gram)
    conflict = torch.where(both > 0, (1 - agree / both.clamp(min=1)) / 2, none)
    block = block_of(module, models[0].index.architecture)
    return Layer(block=block, gram=gram, overlap=none, chance=none, conflict=conflict)
