"""Exact linear algebra of up @ down, which is never formed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.linalg.sides import Side, by_qr, reduced, reduced_together

_CANCELLED = 1e-10
_FADING = 1e-5
NOISE = 2 * float(torch.finfo(torch.float32).eps)
"""Singular values below this share of the norm are rounding noise of fp32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """A matrix [m, n] = up @ down.

    Args:
        up: [m, r].
        down: [r, n].
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of `up`, an upper bound of the rank."""
        return int(self.up.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        return int(self.up.shape[0]), int(self.down.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Svd:
    """Singular directions, the largest first.

    Args:
        u: [m, k], orthonormal columns, the largest entry of each positive.
        s: [k] in fp64, descending.
        v: [n, k], orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor


Turn = Callable[[Tensor], Tensor]
"""Turns directions of a core [a, k] into those of the matrix [m, k]."""


def join(parts: Sequence[Factors]) -> Factors:
    """Return the exact sum of products of one shape: their factors side by side."""
    if len(parts) == 1:
        return parts[0]
    return Factors(
        up=torch.cat([part.up for part in parts], dim=1),
        down=torch.cat([part.down for part in parts], dim=0),
    )


def weighted(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Return Σ strength · up @ down in fp64: the scaled factors side by side.

    Args:
        parts: products of one shape, and what each is multiplied by.
    """
    if len(parts) == 1:
        return scaled(*parts[0])
    shape, device = parts[0][0].shape, parts[0][0].up.device
    rank = sum(part.rank for part, _ in parts)
    # Each part goes straight to its place: to scale and then to join would copy it twice.
    up = torch.empty(shape[0], rank, dtype=torch.float64, device=device)
    down = torch.empty(rank, shape[1], dtype=torch.float64, device=device)
    start = 0
    for part, strength in parts:
        span = slice(start, start + part.rank)
        torch.mul(double(part.up), strength, out=up[:, span])
        down[span] = part.down
        start += part.rank
    return Factors(up=up, down=down)


def scaled(factors: Factors, strength: float) -> Factors:
    """Return strength · up @ down."""
    if strength == 1.0:
        return factors
    return Factors(up=factors.up * strength, down=factors.down)


def dense(factors: Factors) -> Tensor:
    """Return up @ down as one matrix [m, n]."""
    return factors.up @ factors.down


def inner(a: Factors, b: Factors) -> float:
    """Return ⟨a, b⟩, the sum of the products of the entries, in fp64."""
    left = double(a.up).T @ double(b.up)
    right = double(a.down) @ double(b.down).T
    return float((left * right).sum())


def gram(parts: Sequence[Factors]) -> Tensor:
    """Return the inner products [T, T] of T products, in fp64 on the CPU."""
    whole = join(parts)
    up, down = double(whole.up), double(whole.down)
    products = (up.T @ up) * (down @ down.T)
    owner = torch.repeat_interleave(
        torch.arange(len(parts)), torch.tensor([part.rank for part in parts])
    ).to(products.device)
    rows = products.new_zeros(len(parts), whole.rank).index_add_(0, owner, products)
    found = rows.new_zeros(len(parts), len(parts)).index_add_(1, owner, rows)
    return (found + found.T).cpu() / 2


def norm(factors: Factors) -> float:
    """Return the Frobenius norm, right also where parts cancel to their last digits.

    Cost: two Gram matrices; two QR where the parts cancel to less than 1e-5 of their size.
    """
    up, down = double(factors.up), double(factors.down).T
    left, right = up.T @ up, down.T @ down
    lengths = left.diagonal().sqrt(), right.diagonal().sqrt()
    square, bound = float((left * right).sum()), float(lengths[0] @ lengths[1]) ** 2
    if square > _CANCELLED * bound or bound == 0.0:
        return math.sqrt(max(square, 0.0))
    reduced = by_qr(up, lengths[0]), by_qr(down, lengths[1])
    sizes = reduced[0].lengths * reduced[1].lengths
    return float(torch.linalg.vector_norm((reduced[0].core * sizes) @ reduced[1].core.T))


def distance(a: Factors, b: Factors) -> float:
    """Return ‖a − b‖ / ‖a‖: 0 where both are zero, infinite where only `a` is."""
    whole, off = norm(a), norm(join([a, scaled(b, -1.0)]))
    if whole == 0.0:
        return math.inf if off else 0.0
    return off / whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decomposition:
    """The singular values of a product, and its directions once it is known how many are wanted.

    Args:
        s: all of them, [k] in fp64, descending.
        left: turns the core's directions into those of `up`.
        right: likewise of `down`.
        cores: the core's directions, [r, k] each in fp64.
        like: gives the dtype and the device of the directions.
    """

    s: Tensor
    left: "Turn"
    right: "Turn"
    cores: tuple[Tensor, Tensor]
    like: Tensor

    def first(self, rank: int, dtype: torch.dtype | None = None) -> Svd:
        """Return the leading directions; to turn them all would cost as much as the core.

        Args:
            rank: how many.
            dtype: of the directions; that of the factors if left out.
        """
        u, v = (
            turn(core[:, :rank]).to(self.like.device, dtype or self.like.dtype)
            for turn, core in zip((self.left, self.right), self.cores, strict=True)
        )
        u, v = fixed_signs(u, v)
        return Svd(u=u, s=self.s[:rank].cpu(), v=v)


def svd(factors: Factors) -> Svd:
    """Return the exact singular value decomposition, k = min(r, m, n) directions.

    Args:
        factors: on any device, in fp32 or fp64.

    Returns:
        u and v in the dtype and on the device of the factors, s in fp64 on the CPU.

    Cost: see `decomposed`.
    """
    found = decomposed(factors)
    return found.first(len(found.s))


def decomposed(factors: Factors) -> Decomposition:
    """Return the exact singular values of up @ down, and what its directions are made of.

    Args:
        factors: on any device, in fp32 or fp64.

    Cost: see `decomposed_together`.
    """
    (found,) = decomposed_together(factors.up[None], factors.down[None])
    return found


def decomposed_together(ups: Tensor, downs: Tensor) -> list[Decomposition]:
    """Return the exact singular values of b products, and what their directions are made of.

    The left side is reduced to r x r (see `lorakit.linalg.sides`), and of the right one the Gram
    matrix suffices: `_by_products`. Where a singular value is too small for that, or the right side
    has no more rows than columns, both are reduced. The core is decomposed on the CPU, and its
    directions are turned back in fp64.

    Args:
        ups: [b, m, r] in fp32 or fp64, on any device.
        downs: [b, r, n].

    Source: Fukaya et al., CholeskyQR2 (2014), for the accuracy of the Gram matrix.
    Cost: O((m + n) r² + r³) each.
    """
    lefts, rights = reduced_together(double(ups)), double(downs).mT
    products = rights.mT @ rights
    tall = rights.shape[1] > rights.shape[2]
    found = []
    for left, right, product in zip(lefts, rights, products, strict=True):
        one = _by_products(left, right, product, like=ups) if tall else None
        found.append(one or _by_both_sides(left, reduced(right, product), like=ups))
    return found


def _by_products(
    left: Side, right: Tensor, product: Tensor, *, like: Tensor
) -> Decomposition | None:
    """Decompose left @ right.T by the eigenvectors of core @ product @ core.T.

    As `core_svd`, which would take the product's Cholesky factor only to square it again.

    Args:
        left: a side, its core [a, r].
        right: [n, r] in fp64.
        product: right.T @ right.
        like: gives the dtype and the device of the directions.

    Returns:
        None where the smallest singular value is below 1e-5 of the largest one or of the parts.
    """
    core, product = (left.core * left.lengths).cpu(), product.cpu()
    u = torch.linalg.eigh(core @ product @ core.T).eigenvectors.flip(1)
    turn = core.T @ u
    s = ((product @ turn) * turn).sum(dim=0).clamp(min=0).sqrt()
    # Parts that cancel are larger than the sum, and so is their rounding.
    sizes = torch.linalg.vector_norm(core, dim=0) * product.diagonal().sqrt()
    parts = float(torch.linalg.vector_norm(sizes))
    if not s.numel() or not float(s[-1]) > _FADING * max(float(s[0]), parts):
        return None
    return Decomposition(
        s=torch.cummin(s, dim=0).values,
        left=left.turned,
        right=lambda directions: right @ directions.to(right.device),
        cores=(u, turn / s),
        like=like,
    )


def _by_both_sides(left: Side, right: Side, *, like: Tensor) -> Decomposition:
    u, s, v = core_svd(((left.core * (left.lengths * right.lengths)) @ right.core.T).cpu())
    return Decomposition(s=s, left=left.turned, right=right.turned, cores=(u, v), like=like)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Framed:
    """A matrix [m, n] = left @ core @ right.T between two orthonormal bases, which are not made.

    Its singular directions are those of the small core, turned.

    Args:
        shape: (m, n).
        core: [a, b] in fp64.
        left: turns [a, k] into [m, k].
        right: turns [b, k] into [n, k].
    """

    shape: tuple[int, int]
    core: Tensor
    left: "Turn"
    right: "Turn"

    @property
    def rank(self) -> int:
        """The smaller side of the core, an upper bound of the rank."""
        return min(self.core.shape)

    def factors(self) -> Factors:
        """Return the matrix as factors, whose rank is the smaller side of the core."""
        rows, columns = self.core.shape
        one = torch.eye(min(rows, columns), dtype=self.core.dtype)
        if rows <= columns:
            return Factors(up=self.left(one), down=self.right(self.core.T).T)
        return Factors(up=self.left(self.core), down=self.right(one).T)

    def decomposed(self) -> Decomposition:
        """Return the singular values, and what the directions are made of."""
        u, s, v = core_svd(self.core)
        return Decomposition(s=s, left=self.left, right=self.right, cores=(u, v), like=self.core)


def core_svd(core: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a small fp64 matrix [a, b] = u @ diag(s) @ v.T; find `rank` directions, or all.

    By the eigenvectors of core @ core.T, twice as fast as an SVD, unless the smallest singular
    value that is wanted is below 1e-5 of the largest: v would not be orthogonal to 1e-6.
    """
    if core.shape[0] > core.shape[1]:
        v, s, u = core_svd(core.T, rank)
        return u, s, v
    u = torch.linalg.eigh(core @ core.T).eigenvectors.flip(1)[:, :rank]
    scaled_v = core.T @ u
    s = torch.linalg.vector_norm(scaled_v, dim=0)
    if s.numel() and float(s[-1]) > _FADING * float(s[0]):
        return u, torch.cummin(s, dim=0).values, scaled_v / s
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def fixed_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair of directions so that the largest entry of u's column is positive.

    Args:
        u: [m, k], or several of them.
        v: [n, k], or as many of them.
    """
    if not u.numel():
        return u, v
    signs = torch.where(-u.amin(dim=-2) > u.amax(dim=-2), -1.0, 1.0).to(u.dtype).unsqueeze(-2)
    return u * signs, v * signs


def numerical_rank(s: Tensor, shape: tuple[int, int], *, reference: float | None = None) -> int:
    """Return how many singular values are no rounding noise.

    Rounding the entries of both factors to fp32 moves a product by at most eps · ‖product‖, and
    noise of that norm has no larger singular value; what is below twice that is noise. Where
    parts were summed, their rounding does not get smaller when they cancel: so A − A has rank 0
    once `reference` is ‖A‖.

    Args:
        s: [k], descending.
        shape: (m, n) of the matrix.
        reference: ‖·‖ of the largest part that was summed.
    """
    if not s.numel():
        return 0
    whole = float(torch.linalg.vector_norm(s.double()))
    floor = NOISE * max(whole, reference or 0.0)
    return min(int((s.double() > floor).sum()), *shape)


def balanced(found: Svd, rank: int, *, size: float = 1.0) -> Factors:
    """Return the leading directions as factors of equal norms in fp32: √s · size on both sides."""
    root = (found.s[:rank].sqrt() * size).float()
    up, down = found.u[:, :rank].float() * root, found.v[:, :rank].float() * root
    return Factors(up=up, down=down.T.contiguous())


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in fp64, on the CPU where the device has none."""
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor
    # torch's way from fp16 straight to fp64 takes twice as long as by fp32.
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).double()
