"""ΔW in small coordinates: every one of them as a core between two bases that all share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.linalg.dense import truncated_svd
from lorakit.linalg.factored import Factors, Side, reduced
from lorakit.linalg.tiles import Change, Tiled
from lorakit.linalg.tiles import dense as made

_NOISE = 1e-11
"""Directions below this share of the largest are rounding."""
_EIGEN = 1e-10
"""Below this share of the largest square a direction is found by an SVD, not by its square."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cores:
    """Each ΔW [m, n] = left @ core @ right.T, exactly.

    Args:
        cores: [a, b] each, in fp64.
        left: turns [a, k] into [m, k]; its columns are orthonormal.
        right: turns [b, k] into [n, k].
    """

    cores: tuple[Tensor, ...]
    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]

    def spread(self, core: Tensor) -> Factors:
        """Return left @ core @ right.T as factors, whose rank is the smaller side of the core."""
        rows, columns = core.shape
        one = torch.eye(min(rows, columns), dtype=core.dtype)
        if rows <= columns:
            return Factors(up=self.left(one), down=self.right(core.T).T)
        return Factors(up=self.left(core), down=self.right(one).T)


def cores_of(changes: Sequence[Change]) -> Cores:
    """Return the cores of several ΔW of one shape between the singular bases of all of them.

    The left basis is that of [ΔW₁ … ΔW_T], the right one that of them stacked, each ΔW scaled to
    norm 1 first, so that a weak LoRA's directions count as a strong one's. Directions that are
    rounding alone are left out.

    Source: Core Space, arXiv 2509.17786.

    - bases of the ΔW (HOSVD), not of the stacked factors: these change with how a LoRA is factored

    Cost: O((m + n) R² + T R³), R the sum of the ranks.
    """
    factors = [as_factors(change) for change in changes]
    ends = torch.tensor([f.rank for f in factors]).cumsum(0).tolist()
    spans = [slice(end - f.rank, end) for end, f in zip(ends, factors, strict=True)]
    left = reduced(torch.cat([f.up.double() for f in factors], dim=1))
    right = reduced(torch.cat([f.down.double() for f in factors], dim=0).T)
    ups, downs = left.core * left.lengths, right.core * right.lengths
    raw = [ups[:, span] @ downs[:, span].T for span in spans]
    units = [core / size for core in raw if (size := float(core.norm())) > 0]
    if not units:
        units = raw
    us, vs = directions(torch.cat(units, dim=1)), directions(torch.cat([c.T for c in units], dim=1))
    return Cores(
        cores=tuple(us.T @ core @ vs for core in raw),
        left=_turning(left, us),
        right=_turning(right, vs),
    )


def _turning(side: Side, basis: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda core: side.turned(basis @ core)


def directions(wide: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix that are no rounding, the largest first.

    Args:
        wide: [k, l] in fp64.
    """
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    top = float(values[-1]) if len(values) else 0.0
    found: Tensor = vectors.flip(1)
    if top <= 0.0:
        return found[:, :0]
    if float(values[0]) > _EIGEN * top:
        return found
    found, s, _ = torch.linalg.svd(wide, full_matrices=False)
    return found[:, s > _NOISE * s[0]]


def nothing(shape: tuple[int, int]) -> Factors:
    """Return factors of a ΔW [m, n] that is zero."""
    return Factors(up=torch.zeros(shape[0], 1), down=torch.zeros(1, shape[1]))


def as_factors(change: Change) -> Factors:
    """Return a ΔW as factors: a matrix by its singular directions that are no rounding."""
    if isinstance(change, Factors):
        return change
    matrix = made(change) if isinstance(change, Tiled) else change
    found = truncated_svd(matrix, rank=min(matrix.shape), method="exact")
    return Factors(up=found.u * found.s.to(found.u), down=found.v.T)
