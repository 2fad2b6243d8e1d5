"""The leading singular directions of large matrices by block Golub-Kahan bidiagonalisation.

Each half pass is one product of the matrix with a block of directions, and grows one of two
orthonormal bases: the rows' space P or the columns' space Q. Because every block is kept, not
only the last one as in subspace iteration, the captured energy converges with the square root of
the number of passes. All other work is on the small core T = Qᵀ A P, in fp64 on the CPU.

Matrices of one shape are taken together: a graphics card wants many products at once, a CPU one.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lorakit.linalg.factored import core_svd, double
from lorakit.linalg.masks import gaussian

_MOST_HALF_PASSES = 16
_LEAST_BLOCK = 16
_WELL = 1e-3
_GARBAGE = torch.tensor(0.1, dtype=torch.float64)
_LEAST_REST = 1e-6
_FASTEST = 0.1
_STARTS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leading:
    """What was found of one matrix: u [m, k], s [k] in fp64, v [n, k], after how many half passes.

    u and v are views of rows that lie one after another. `worth` is 0, or what one more half pass
    is estimated to be worth of the error where it had to stop before that was little.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    half_passes: int
    worth: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class _Basis:
    """Orthonormal rows of b matrices, as many as are used of [b, capacity, d].

    Where a matrix has no further direction its row is zero.
    """

    storage: Tensor
    used: int = 0

    @property
    def rows(self) -> Tensor:
        return self.storage[:, : self.used]

    def append(self, block: Tensor, noise: Tensor) -> Tensor:
        """Add the directions of `block` [b, w, d] that are new, and express it in all of them.

        Args:
            block: is overwritten.
            noise: [b] in fp64; directions no longer than this are rounding.

        Returns:
            C [b, used, w] in fp64 on the CPU: block = C.mT @ rows.

        Source: Kahan's "twice is enough", and Fukaya et al., CholeskyQR2 (2014).
        """
        room = max(0, block.shape[2] - self.used)
        known = self._project(block)
        part, triangle = _orthonormal(block, _gram(double(block)), noise, room)
        again = self._project(part)
        # The rows are nearly orthonormal by now, or rounding that was scaled up.
        part, second = _orthonormal(part, _gram(part).double(), _GARBAGE.expand_as(noise), room)
        self.storage[:, self.used : self.used + block.shape[1]] = part
        self.used += block.shape[1]
        return torch.cat([known + again @ triangle, second @ triangle], dim=1)

    def _project(self, block: Tensor) -> Tensor:
        """Take out of `block` what lies in the basis; return it as coefficients [b, used, w]."""
        inside = self.rows @ block.mT
        block.baddbmm_(inside.mT, self.rows, alpha=-1.0)
        return inside.cpu().double()


def _gram(block: Tensor) -> Tensor:
    return (block @ block.mT).cpu()


def _orthonormal(block: Tensor, gram: Tensor, noise: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows Q [b, w, d] of a block, and R [b, w, w] with block = R.mT @ Q.

    Rows that the block has no direction for are zero.

    Args:
        block: [b, w, d].
        gram: block @ block.mT in fp64 on the CPU.
        noise: [b]; directions no longer than this do not count.
        room: how many directions there can be at the most.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    if room >= block.shape[1] and bool((lengths > noise[:, None]).all()):
        lower, failed = torch.linalg.cholesky_ex(gram / lengths[:, None] / lengths[:, :, None])
        shortest = (lower.diagonal(dim1=-2, dim2=-1) * lengths).amin(dim=1)
        if not bool(failed.any()) and bool((shortest > _WELL * lengths.amax(dim=1)).all()):
            one = torch.eye(block.shape[1], dtype=gram.dtype).expand_as(gram)
            inverse = torch.linalg.solve_triangular(lower, one, upper=False) / lengths[:, None]
            return inverse.to(block) @ block, (lower * lengths[:, :, None]).mT
    values, vectors = torch.linalg.eigh(gram)
    lengths, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    live = lengths > noise[:, None]
    live[:, room:] = False
    turn = vectors * torch.where(live, 1 / lengths, 0.0)[:, None]
    return turn.mT.to(block) @ block, (vectors * torch.where(live, lengths, 0.0)[:, None]).mT


def _times(block: Tensor, matrix: Tensor) -> Tensor:
    """Return block @ matrix, [b, w, p] and [b, p, q], with the large matrix read along its rows."""
    if matrix.stride(-1) == 1:
        return block @ matrix
    return (matrix.mT @ block.mT).mT.contiguous()


@dataclass(slots=True, kw_only=True, eq=False)
class _Bidiagonalisation:
    """The bases and the cores of b matrices [b, m, n], m the smaller side."""

    matrix: Tensor
    left: _Basis
    right: _Basis
    core: Tensor
    top: Tensor | None = None
    half_passes: int = 0
    exhausted: bool = False
    captured: list[Tensor] = field(default_factory=list)

    def half_pass(self, width: int, rank: int) -> None:
        """Multiply the newest `width` directions by the matrix, alternating sides.

        The product is exact, so the core's new rows (or columns) are complete.
        """
        grow_right = self.half_passes % 2 == 0
        old, new = (self.left, self.right) if grow_right else (self.right, self.left)
        newest = slice(old.used - width, old.used)
        block = _times(old.storage[:, newest], self.matrix if grow_right else self.matrix.mT)
        if self.top is None:
            self.top = torch.linalg.vector_norm(block, dim=(1, 2)).cpu().double()
        before = new.used
        found = new.append(block, 16 * torch.finfo(block.dtype).eps * self.top)
        if grow_right:
            self.core[:, newest, : new.used] = found.mT
        else:
            self.core[:, : new.used, newest] = found
        self.half_passes += 1
        self.exhausted = not bool(found[:, before:].any())
        self.captured.append(_energy(self.small(), rank))

    def small(self) -> Tensor:
        return self.core[:, : self.left.used, : self.right.used]


def _energy(small: Tensor, rank: int) -> Tensor:
    """Return the energy [b] of the `rank` leading directions of cores [b, p, q]."""
    if min(small.shape[1:]) <= rank:
        return small.square().sum(dim=(1, 2))
    product = small @ small.mT if small.shape[1] <= small.shape[2] else small.mT @ small
    values: Tensor = torch.linalg.eigvalsh(product)
    return values[:, -rank:].clamp(min=0).sum(dim=1)


def leading(
    matrix: Tensor, rank: int, *, energy: Tensor, tolerance: float, seed_name: str
) -> list[Leading]:
    """Find the `rank` leading singular directions of each of b matrices.

    Args:
        matrix: [b, m, n] with m <= n, a view of any strides, finite and not zero.
        energy: their squared norms, [b] in fp64 on the CPU.
        tolerance: stop when one more product is estimated to be worth less of the error.
        seed_name: of the random start, the same for every matrix of one height.

    Source: Golub, Luk and Overton (1981); Musco and Musco, Randomized block Krylov methods (2015).

    - A block as wide as the rank finds singular values of any multiplicity that matters.
    - The random start lies on the short side, and stays in the basis at no cost.

    Cost: 4 to 7 products of width `rank` for most spectra, and O((m + n) (3 rank)²).
    """
    count, rows, columns = matrix.shape
    block = min(max(rank, _LEAST_BLOCK), rows)
    capacity = block * (_MOST_HALF_PASSES // 2 + 1)
    work = _Bidiagonalisation(
        matrix=matrix,
        left=_Basis(storage=matrix.new_empty(count, capacity, rows)),
        right=_Basis(storage=matrix.new_empty(count, capacity, columns)),
        core=torch.zeros(count, capacity, capacity, dtype=torch.float64),
    )
    start = _start(seed_name, block, rows).to(matrix).expand(count, block, rows)
    work.left.append(start.clone(), torch.zeros(count, dtype=torch.float64))
    worth = torch.full((count,), math.inf, dtype=torch.float64)
    while work.half_passes < _MOST_HALF_PASSES and float(worth.max()) >= tolerance:
        work.half_pass(block, rank)
        worth = _worth_of_another(work.captured, energy)
        if work.exhausted:
            worth.zero_()
    left = torch.where(worth < tolerance, 0.0, worth).tolist()
    return [_leading(work, place, rank, left[place]) for place in range(count)]


def _leading(work: _Bidiagonalisation, place: int, rank: int, worth: float) -> Leading:
    u, s, v = core_svd(work.small()[place], rank)
    left, right = work.left.rows[place], work.right.rows[place]
    return Leading(
        u=(u.T.to(left) @ left).T,
        s=s,
        v=(v.T.to(right) @ right).T,
        half_passes=work.half_passes,
        worth=worth,
    )


@lru_cache(maxsize=_STARTS)
def _start(seed_name: str, block: int, rows: int) -> Tensor:
    return gaussian(f"{seed_name} {rows}", (block, rows))


def _worth_of_another(captured: list[Tensor], energy: Tensor) -> Tensor:
    """Return how much smaller one more half pass would make each error, relative, [b].

    The gain of the next one continues the last ones: by the last ratio or, because on a rectangle
    one side gains more than the other, by the mean of the last two.
    """
    if len(captured) < 3:
        return torch.full_like(energy, math.inf)
    gains = [after - before for before, after in pairwise(captured[-4:])]
    rest = torch.maximum(energy - captured[-1], _LEAST_REST * energy)
    last = gains[-1].clamp(min=0)
    ratio = _ratio(last, gains[-2])
    if len(gains) > 2:
        ratio = torch.maximum(ratio, _ratio(last, gains[-3]).sqrt())
    return last * ratio / (2 * rest)


def _ratio(gain: Tensor, before: Tensor) -> Tensor:
    # The first gains may be a few strong directions, after which the rest goes on more slowly.
    return torch.where(before > 0, gain / before, 0.0).clamp(_FASTEST, 1.0)
