"""Where the signs of several ΔW disagree: how often, and how much of the change that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.methods.delta import Delta
from lorakit.methods.sampling import elements_of, places_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conflict:
    """Sums over elements a and b of each pair of ΔW, [T, T] each, in fp64.

    Args:
        both: the elements where neither is zero.
        against: those of them whose signs disagree.
        size: Σ |a · b|.
        opposed: the part of it where the signs disagree.
        sampled: whether they were counted on a sample, and stand for all.
    """

    both: Tensor
    against: Tensor
    size: Tensor
    opposed: Tensor
    sampled: bool = False

    @property
    def share(self) -> Tensor:
        """The share of the elements whose signs disagree, 0 where a pair shares none."""
        return _share(self.against, self.both)

    @property
    def weighted(self) -> Tensor:
        """The same with each element counted by |a · b|: large changes count more."""
        return _share(self.opposed, self.size)


def conflict_of(rows: Tensor, *, stands_for: float = 1.0, sampled: bool = False) -> Conflict:
    """Count where signs disagree.

    Args:
        rows: [T, N], N elements of each ΔW, strengths included.
        stands_for: the elements that each of them stands for.
        sampled: whether they are a sample.
    """
    signs, sizes = rows.sign(), rows.abs()
    both, agreed = signs.abs() @ signs.abs().T, signs @ signs.T
    size, product = sizes @ sizes.T, rows @ rows.T
    return Conflict(
        both=both * stands_for,
        against=(both - agreed) / 2 * stands_for,
        size=size * stands_for,
        opposed=(size - product).clamp(min=0) / 2 * stands_for,
        sampled=sampled,
    )


def sampled_conflict(deltas: Sequence[Delta]) -> Conflict:
    """Count where the signs of ΔW disagree, on all elements of a small layer.

    Of a larger one than 256 rows or columns, on 256 of them, spread evenly: always the same ones.

    Args:
        deltas: of one module, all of one shape.
    """
    shape = deltas[0].shape
    rows, columns = places_of(shape)
    some = torch.stack(
        [elements_of(d.change, rows, columns).flatten() * d.strength for d in deltas]
    )
    whole, seen = shape[0] * shape[1], len(rows) * len(columns)
    return conflict_of(some, stands_for=whole / max(1, seen), sampled=seen < whole)


def summed_conflict(parts: Sequence[Conflict]) -> Conflict:
    """Add the counts of several layers, or of several parts of one."""
    return Conflict(
        both=torch.stack([part.both for part in parts]).sum(dim=0),
        against=torch.stack([part.against for part in parts]).sum(dim=0),
        size=torch.stack([part.size for part in parts]).sum(dim=0),
        opposed=torch.stack([part.opposed for part in parts]).sum(dim=0),
        sampled=any(part.sampled for part in parts),
    )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)
