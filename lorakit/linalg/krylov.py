"""The leading singular directions of a large matrix by block Golub-Kahan bidiagonalisation.

Each half pass is one product of the matrix with a block of directions, and grows one of two
orthonormal bases: the rows' space P or the columns' space Q. Because every block is kept, not
only the last one as in subspace iteration, the captured energy converges with the square root of
the number of passes. All other work is on the small core T = Qᵀ A P, in fp64.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lorakit.linalg.factored import core_svd
from lorakit.linalg.masks import gaussian

_MOST_HALF_PASSES = 16
_SLOWEST, _FASTEST = 0.9, 0.1
_LEAST_BLOCK = 16
_SHRUNK = 0.03


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leading:
    """What was found: u [m, k], s [k] in fp64, v [n, k], and how many half passes it took."""

    u: Tensor
    s: Tensor
    v: Tensor
    half_passes: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Basis:
    """Orthonormal rows, as many as are used of [capacity, d]."""

    storage: Tensor
    used: int = 0

    @property
    def rows(self) -> Tensor:
        return self.storage[: self.used]

    def append(self, block: Tensor, noise: float) -> Tensor:
        """Add the directions of `block` [w, d] that are new, and express the block in all of them.

        Args:
            block: is overwritten.
            noise: directions no longer than this are rounding.

        Returns:
            C [used, w] in fp64 on the CPU: block = C.T @ rows.
        """
        whole = float(torch.linalg.vector_norm(block))
        known = self._project(block)
        values, vectors = torch.linalg.eigh(_gram(block))
        lengths = values.clamp(min=0).sqrt()
        fresh = (lengths > noise).nonzero().flatten().flip(0)
        fresh = fresh[: len(self.storage) - self.used]
        turn, lengths = vectors[:, fresh], lengths[fresh]
        part = (turn / lengths).T.to(block) @ block
        triangle = (turn * lengths).T
        if len(fresh) and float(lengths[-1]) < _SHRUNK * whole:
            # What rounding left of the known directions was scaled up: take it out once more.
            again = self._project(part)
            lower = torch.linalg.cholesky(_gram(part))
            one = torch.eye(len(fresh), dtype=torch.float64)
            part = torch.linalg.solve_triangular(lower, one, upper=False).to(part) @ part
            known += again @ triangle
            triangle = lower.T @ triangle
        self.storage[self.used : self.used + len(fresh)] = part
        self.used += len(fresh)
        return torch.cat([known, triangle])

    def _project(self, block: Tensor) -> Tensor:
        """Take out of `block` what lies in the basis; return it as coefficients [used, w]."""
        inside = self.rows @ block.T
        block.addmm_(inside.T, self.rows, alpha=-1.0)
        return inside.double().cpu()


def _gram(block: Tensor) -> Tensor:
    wide = block.double()
    return (wide @ wide.T).cpu()


@dataclass(slots=True, kw_only=True, eq=False)
class _Bidiagonalisation:
    """The bases and the core of one matrix [m, n], m the smaller side."""

    matrix: Tensor
    left: _Basis
    right: _Basis
    core: Tensor
    top: float = 0.0
    widths: list[int] = field(default_factory=list)

    def half_pass(self) -> int:
        """Multiply the newest block by the matrix, alternating sides; return the new block's width.

        The product is exact, so the core's new rows (or columns) are complete.
        """
        grow_right = len(self.widths) % 2 == 0
        old, new = (self.left, self.right) if grow_right else (self.right, self.left)
        width = self.widths[-1] if self.widths else old.used
        newest = slice(old.used - width, old.used)
        block = old.storage[newest] @ (self.matrix if grow_right else self.matrix.T)
        if not self.top:
            self.top = float(torch.linalg.vector_norm(block))
        before = new.used
        eps = float(torch.finfo(block.dtype).eps)
        found = new.append(block, 16 * eps * self.top)
        if grow_right:
            self.core[newest, : new.used] = found.T
        else:
            self.core[: new.used, newest] = found
        self.widths.append(new.used - before)
        return found.shape[0] - before

    def small(self) -> Tensor:
        return self.core[: self.left.used, : self.right.used]

    def squares(self) -> Tensor:
        """Return the squares of the core's singular values, the largest first."""
        small = self.small()
        product = small @ small.T if small.shape[0] <= small.shape[1] else small.T @ small
        values: Tensor = torch.linalg.eigvalsh(product)
        return values.flip(0).clamp(min=0)


def leading(
    matrix: Tensor, rank: int, *, energy: float, tolerance: float, seed_name: str
) -> Leading:
    """Find the `rank` leading singular directions of a matrix.

    Args:
        matrix: [m, n] with m <= n, a view of any strides, finite and not zero.
        energy: its squared norm.
        tolerance: the estimated relative excess of the error over the optimal one to stop at.
        seed_name: of the random start.

    Source: Golub, Luk and Overton (1981); Musco and Musco, Randomized block Krylov methods (2015).

    - A block as wide as the rank finds singular values of any multiplicity that matters.
    - The random start lies on the short side, and stays in the basis at no cost.

    Cost: 4 to 7 products of width `rank` for most spectra, and O((m + n) (3 rank)²).
    """
    rows, columns = matrix.shape
    block = min(max(rank, _LEAST_BLOCK), rows)
    capacity = block * (_MOST_HALF_PASSES // 2 + 1)
    work = _Bidiagonalisation(
        matrix=matrix,
        left=_Basis(storage=matrix.new_empty(min(capacity, rows), rows)),
        right=_Basis(storage=matrix.new_empty(min(capacity, rows), columns)),
        core=torch.zeros(min(capacity, rows), min(capacity, rows), dtype=torch.float64),
    )
    work.left.append(gaussian(seed_name, (block, rows)).to(matrix), 0.0)
    captured: list[float] = []
    while len(work.widths) < _MOST_HALF_PASSES:
        width = work.half_pass()
        captured.append(float(work.squares()[:rank].sum()))
        if width == 0 or _excess(captured, energy) < tolerance:
            break
    u, s, v = core_svd(work.small())
    return Leading(
        u=work.left.rows.T @ u[:, :rank].to(matrix),
        s=s[:rank],
        v=work.right.rows.T @ v[:, :rank].to(matrix),
        half_passes=len(work.widths),
    )


def _excess(captured: list[float], energy: float) -> float:
    """Estimate how far the error is above the optimal one, relative, from how it fell so far.

    The gains of two successive half passes count together, because on a rectangle one side gains
    more; what is still to come is their geometric continuation.
    """
    if len(captured) < 3:
        return math.inf
    gains = [b - a for a, b in pairwise(captured)]
    rest = max(energy - captured[-1], 1e-6 * energy)
    pair = gains[-1] + gains[-2]
    before = gains[-3] + gains[-4] if len(gains) > 3 else gains[-2] + gains[-2]
    # The first gains may be a few strong directions: the last two tell how the rest goes on.
    recent = (gains[-1] / gains[-2]) ** 2 if gains[-2] > 0 else _FASTEST
    ratio = max(pair / before if before > 0 else _FASTEST, recent)
    ratio = min(max(ratio, _FASTEST), _SLOWEST)
    return pair * ratio / (1 - ratio) / (2 * rest)
