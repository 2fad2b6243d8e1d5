"""One layer's numbers of a comparison, and their sums by block and in total."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.linalg.overlap import Angles
from lorakit.methods.conflict import Conflict, summed_conflict
from lorakit.operations.advice import advice
from lorakit.operations.comparison import TOTAL, Compared, Comparison, Matrix
from lorakit.operations.mixtures import cut_of, mixture_of

SAMPLED = (
    "Conflicts of sign in layers over 256 x 256 were counted on 65,536 elements of each, spread "
    "evenly over it; all other numbers are of every element."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """One layer's numbers.

    Args:
        module: the canonical name.
        block: its block id.
        angles: of what is compared; of models' weights no overlap.
        conflict: of the signs.
        kept: the energy that a rank rule keeps of the sum.
        whole: all of it.
        noise: of models, the squared rounding error that each is expected to hold.
    """

    module: str
    block: str
    angles: Angles
    conflict: Conflict
    kept: float = 0.0
    whole: float = 0.0
    noise: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is compared.

    Args:
        kind: "loras", "models" or "changes".
        names: perhaps paths; shortened where that leaves them apart.
        alone: how many layers each has that not all of them have.
        order: of the blocks.
        notes: what is to be said.
        others: how many tensors beside the layers differ, where they were compared.
        base: what changes are from.
    """

    kind: str
    names: tuple[str, ...]
    alone: tuple[int, ...]
    order: tuple[str, ...]
    notes: tuple[str, ...] = ()
    others: int | None = None
    base: str | None = None


def summed(subject: Subject, layers: Sequence[Layer]) -> Comparison:
    """Put layers together by block and in total, and say what it means."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    order = [block for block in subject.order if block in blocks]
    order += sorted(blocks.keys() - set(order))
    base = () if subject.base is None else (subject.base,)
    every = short_names((*base, *subject.names))
    names = every[len(base) :]
    found = Comparison(
        kind=subject.kind,
        names=names,
        blocks=tuple(_together(block, blocks[block]) for block in order),
        total=_together(TOTAL, layers),
        rows=tuple(
            replace(_together(layer.block, [layer]), module=layer.module) for layer in layers
        ),
        only_in=_counted(names, subject.alone),
        notes=_noted(subject.notes, layers),
        base=every[0] if base else None,
    )
    noise = [math.fsum(parts) for parts in zip(*(layer.noise for layer in layers), strict=True)]
    mixture = mixture_of(found, noise=noise)
    found = replace(found, mixture=mixture, cut=None if mixture else cut_of(found))
    return replace(found, advice=advice(found, others=subject.others))


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return file names without folder and ending, where these tell all apart; else numbered."""
    plain = [Path(name).name.removesuffix(".safetensors") or name for name in names]
    chosen = plain if len(set(plain)) == len(set(names)) else list(names)
    return tuple(
        name if not chosen[:place].count(name) else f"{name} ({chosen[:place].count(name) + 1})"
        for place, name in enumerate(chosen)
    )


def _counted(names: Sequence[str], counts: Sequence[int]) -> Mapping[str, int]:
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def _noted(notes: tuple[str, ...], layers: Sequence[Layer]) -> tuple[str, ...]:
    return (*notes, SAMPLED) if any(layer.conflict.sampled for layer in layers) else notes


def _together(block: str, layers: Sequence[Layer]) -> Compared:
    conflict = summed_conflict([layer.conflict for layer in layers])
    whole = math.fsum(layer.whole for layer in layers)
    return Compared(
        block=block,
        layers=len(layers),
        gram=_tuples(torch.stack([layer.angles.gram for layer in layers]).sum(dim=0)),
        apart=_tuples(torch.stack([layer.angles.apart for layer in layers]).sum(dim=0)),
        overlap=_mean(layers, [layer.angles.overlap for layer in layers]),
        chance=_mean(layers, [layer.angles.chance for layer in layers]),
        best=_tuples(torch.stack([layer.angles.best for layer in layers]).sum(dim=0)),
        conflict=_tuples(conflict.share),
        weighted_conflict=_tuples(conflict.weighted),
        energy=math.fsum(layer.kept for layer in layers) / whole if whole else None,
    )


def _mean(layers: Sequence[Layer], values: Sequence[Tensor]) -> Matrix:
    """Return the mean over the layers that both have, weighed by the product of their norms."""
    if not values[0].numel():
        return ()
    norms = torch.stack([layer.angles.gram.diagonal().clamp(min=0).sqrt() for layer in layers])
    weights = norms[:, :, None] * norms[:, None, :]
    total, sums = (weights * torch.stack(tuple(values))).sum(dim=0), weights.sum(dim=0)
    return _tuples(torch.where(sums > 0, total / torch.where(sums > 0, sums, 1.0), 0.0))


def _tuples(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())
