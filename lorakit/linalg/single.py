"""The leading directions of up @ down by products in fp32, where those are exact enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorakit.linalg.dense import TruncatedSvd
from lorakit.linalg.devices import filled
from lorakit.linalg.factored import double, fixed_signs

_DEPENDENT = 100.0
_FAINT = 1e-2
_LEFT_OUT = 1e-4
_RANGE = (1e-20, 1e20)
_ROWS = 2048
"""Rows whose products are summed in fp32; the sum of more is taken in fp64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """A matrix [m, n] = factor · up @ down.

    Args:
        up: [m, r], in 16 bits.
        down: [r, n], likewise.
        factor: what their product is multiplied by.
    """

    up: Tensor
    down: Tensor
    factor: float


def side_by_side(sums: Sequence[Sequence[Term]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return sums of terms as the products of ups [b, m, r] and downs [b, r, n] in fp32.

    Args:
        sums: of one shape, and of as many directions each.
        device: where the products are to be.
    """
    rank = sum(_ranks(sums[0]))
    rows, columns = len(sums[0][0].up), sums[0][0].down.shape[1]
    ups = filled([partial(_write_ups, terms) for terms in sums], (rows, rank), device)
    return ups, filled([partial(_write_downs, terms) for terms in sums], (rank, columns), device)


def _write_ups(terms: Sequence[Term], room: Tensor) -> None:
    for term, place in zip(terms, torch.split(room, _ranks(terms), dim=1), strict=True):
        place.copy_(term.up)
        if term.factor != 1.0:
            place.mul_(term.factor)


def _write_downs(terms: Sequence[Term], room: Tensor) -> None:
    for term, place in zip(terms, torch.split(room, _ranks(terms)), strict=True):
        place.copy_(term.down)


def _ranks(terms: Sequence[Term]) -> list[int]:
    return [len(term.down) for term in terms]


def leading_together(ups: Tensor, downs: Tensor, rank: int) -> list[TruncatedSvd | None]:
    """Return the `rank` leading directions of each of b products.

    The Gram matrices are of products in fp32, and all else is in fp64. What comes of the directions
    is a projection of ΔW even so, whose error is above the best one by δ² only, where δ tells how
    far the rows that `down` is reduced to are from orthonormal ones: 1e-5 for most, 6e-4 at most.

    Args:
        ups: [b, m, r] in fp32, on any device.
        downs: [b, r, n].
        rank: how many directions are wanted.

    Returns:
        None for a product whose rows in `down` are too dependent, whose last direction wanted is
        below 1/100 of the largest one or of the parts, or that leaves out less than 1e-4 of the
        energy: there only fp64 is exact enough, see `factored.decomposed_together`.

    Cost: half that of fp64.
    """
    count, rows, inner = ups.shape
    if rank >= inner or inner >= downs.shape[2] or inner > rows:
        return [None] * count
    left, right = _gram(ups), _gram(downs.mT)
    weights, lengths = (gram.diagonal(dim1=-2, dim2=-1).sqrt() for gram in (left, right))
    # A zero column has no part in the sum; a zero row fails as it should.
    fits = _in_range(torch.where(weights > 0, weights, 1.0)) & _in_range(lengths)
    lower, failed = torch.linalg.cholesky_ex(right / lengths[:, None] / lengths[:, :, None])
    one = torch.eye(inner, dtype=lower.dtype).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    # Rows of length one: the square of this times eps is δ.
    fits &= (failed == 0) & (torch.linalg.matrix_norm(inverse) < _DEPENDENT)
    found: list[TruncatedSvd | None] = [None] * count
    live = fits.nonzero().flatten()
    if not len(live):
        return found
    if len(live) < count:
        ups, downs = ups[live.to(ups.device)], downs[live.to(downs.device)]
        left, weights, lengths, lower, inverse = (
            one[live] for one in (left, weights, lengths, lower, inverse)
        )
    core = lower.mT * lengths[:, None]
    energies, vectors = (one.flip(-1) for one in torch.linalg.eigh(core @ left @ core.mT))
    s, v = energies.clamp(min=0).sqrt()[:, :rank], vectors[:, :, :rank]
    parts = torch.linalg.vector_norm(weights * lengths, dim=1)
    rest, whole = energies[:, rank:].sum(dim=1), energies.sum(dim=1)
    clear = (s[:, -1] > _FAINT * torch.maximum(s[:, 0], parts)) & (rest >= _LEFT_OUT * whole)
    near = ups @ (core.mT @ v / s[:, None]).to(ups)
    # Along the rows of `down`, which are those of the file too.
    far = (((inverse.mT / lengths[:, :, None]) @ v).mT.to(downs) @ downs).mT
    near, far = fixed_signs(near, far)
    for place in clear.nonzero().flatten().tolist():
        found[int(live[place])] = TruncatedSvd(
            u=near[place],
            s=s[place],
            v=far[place],
            energy_total=float(whole[place]),
            residual=math.sqrt(float(rest[place] / whole[place])),
            exact=True,
        )
    return found


def _gram(sides: Tensor) -> Tensor:
    """Return sides.mT @ sides of [b, d, r] in fp64 on the CPU."""
    parts = max(1, sides.shape[1] // _ROWS)
    products = [double(part.mT @ part) for part in sides.tensor_split(parts, dim=1)]
    return sum(products[1:], start=products[0]).cpu()


def _in_range(lengths: Tensor) -> Tensor:
    low, high = _RANGE
    return ((lengths > low) & (lengths < high)).all(dim=1)
