"""ΔW in small coordinates: every one of them as a core between two bases that all share."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorakit.linalg.dense import truncated_svd
from lorakit.linalg.factored import Factors, Framed, Turn
from lorakit.linalg.sides import Side, reduced
from lorakit.linalg.tiles import Change, Tiled
from lorakit.linalg.tiles import dense as made

_NOISE = 2 * float(torch.finfo(torch.float32).eps)
"""A direction that holds less than this share of a ΔW is rounding of it, see `numerical_rank`."""
_EIGEN = 1e-10
"""Below this share of the largest square a direction is found by an SVD, not by its square."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cores:
    """Each ΔW [m, n] = left @ core @ right.T, exactly.

    Args:
        shape: (m, n).
        cores: [a, b] each, in fp64.
        left: turns [a, k] into [m, k]; its columns are orthonormal.
        right: turns [b, k] into [n, k].
    """

    shape: tuple[int, int]
    cores: tuple[Tensor, ...]
    left: Turn
    right: Turn

    def spread(self, core: Tensor) -> Framed:
        """Return left @ core @ right.T."""
        return Framed(shape=self.shape, core=core, left=self.left, right=self.right)


def cores_of(changes: Sequence[Change]) -> Cores:
    """Return the cores of several ΔW of one shape between the singular bases of all of them.

    The left basis is that of [ΔW₁ … ΔW_T], the right one that of them stacked, each ΔW scaled to
    norm 1 first, so that a weak LoRA's directions count as a strong one's and no strength changes
    the bases. Directions that are rounding alone are left out: a copy of a LoRA in other factors
    brings none. The same ΔW twice has the same core, to the last bit.

    Source: Core Space, arXiv 2509.17786.

    - bases of the ΔW (HOSVD), not of the stacked factors: these change with how a LoRA is factored

    Cost: O((m + n) R² + T R³), R the sum of the ranks.
    """
    factors, places = distinct([as_factors(change) for change in changes])
    left = reduced(torch.cat([f.up for f in factors], dim=1))
    right = reduced(torch.cat([f.down for f in factors], dim=0).T)
    ups, downs = left.core * left.lengths, right.core * right.lengths
    raw = [ups[:, span] @ downs[:, span].T for span in spans(factors)]
    sizes = [float(core.norm()) for core in raw]
    units = [raw[place] / sizes[place] for place in places if sizes[place] > 0] or raw
    us, vs = directions(units), directions([core.T for core in units])
    cores = [us.T @ core @ vs for core in raw]
    return Cores(
        shape=factors[0].shape,
        cores=tuple(cores[place] for place in places),
        left=_turning(left, us),
        right=_turning(right, vs),
    )


def distinct(factors: Sequence[Factors]) -> tuple[list[Factors], list[int]]:
    """Return the factors in fp64 without those that were there before, and where each is found.

    Worked out twice, one ΔW would differ in its last bits, and these would decide an election.
    """
    found: list[Factors] = []
    places = []
    for one in factors:
        wide = Factors(up=one.up.double(), down=one.down.double())
        same = (place for place, other in enumerate(found) if _equal(wide, other))
        places.append(next(same, len(found)))
        if places[-1] == len(found):
            found.append(wide)
    return found, places


def _equal(one: Factors, other: Factors) -> bool:
    return torch.equal(one.up, other.up) and torch.equal(one.down, other.down)


def spans(factors: Sequence[Factors]) -> list[slice]:
    """Return where the columns of each `up` are once they lie side by side."""
    ends = list(accumulate(f.rank for f in factors))
    return [slice(end - f.rank, end) for end, f in zip(ends, factors, strict=True)]


def _turning(side: Side, basis: Tensor) -> Turn:
    return lambda core: side.turned(basis @ core)


def directions(blocks: Sequence[Tensor]) -> Tensor:
    """Return the left singular vectors of matrices side by side, the largest first.

    Those are left out that are rounding in every one of the matrices, however large it is beside
    the others.

    Args:
        blocks: [k, l] each, in fp64.
    """
    wide = torch.cat(tuple(blocks), dim=1)
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    found: Tensor = vectors.flip(1)
    if not len(values) or float(values[-1]) <= 0.0:
        return found[:, :0]
    if float(values[0]) > _EIGEN * float(values[-1]):
        return found
    found = torch.linalg.svd(wide, full_matrices=False).U
    held = [torch.linalg.vector_norm(found.T @ block, dim=1) for block in blocks]
    shares = [rows > _NOISE * float(torch.linalg.vector_norm(rows)) for rows in held]
    return found[:, torch.stack(shares).any(dim=0)]


def nothing(shape: tuple[int, int]) -> Factors:
    """Return factors of a ΔW [m, n] that is zero."""
    return Factors(up=torch.zeros(shape[0], 1), down=torch.zeros(1, shape[1]))


def as_factors(change: Change) -> Factors:
    """Return a ΔW as factors: a matrix by its singular directions that are no rounding."""
    if isinstance(change, Framed):
        return change.factors()
    if isinstance(change, Factors):
        return change
    matrix = made(change) if isinstance(change, Tiled) else change
    found = truncated_svd(matrix, rank=min(matrix.shape), method="exact")
    return Factors(up=found.u * found.s.to(found.u), down=found.v.T)
