"""The leading directions of up @ down by products in fp32, where those are exact enough."""

import torch
from torch import Tensor

from lorakit.linalg.factored import Decomposition

_DEPENDENT = 100.0
_FAINT = 1e-2
_LEFT_OUT = 1e-4
_RANGE = (1e-20, 1e20)
_ROWS = 2048
"""Rows whose products are summed in fp32; the sum of more is taken in fp64."""


def leading_together(ups: Tensor, downs: Tensor, rank: int) -> list[Decomposition | None]:
    """Return the singular values of b products, from which `rank` directions can be made.

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
    lefts, rights = _gram(ups).cpu(), _gram(downs.mT).cpu()
    return [
        _decomposed(up, down, left, right, rank)
        for up, down, left, right in zip(ups, downs, lefts, rights, strict=True)
    ]


def _gram(sides: Tensor) -> Tensor:
    """Return sides.mT @ sides of [b, d, r] in fp64."""
    parts = max(1, sides.shape[1] // _ROWS)
    products = (part.mT @ part for part in sides.tensor_split(parts, dim=1))
    total = next(products).double()
    for product in products:
        total += product
    return total


def _decomposed(
    up: Tensor, down: Tensor, left: Tensor, right: Tensor, rank: int
) -> Decomposition | None:
    """Decompose up @ down, of which left = up.T @ up and right = down @ down.T in fp64."""
    lengths, weights = right.diagonal().sqrt(), left.diagonal().sqrt()
    if not (_in_range(lengths) and _in_range(weights[weights > 0])):
        return None
    lower, failed = torch.linalg.cholesky_ex(right / lengths / lengths[:, None])
    one = torch.eye(len(lower), dtype=lower.dtype)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    # Rows of length one: the square of this times eps is δ.
    if int(failed) or not float(torch.linalg.matrix_norm(inverse)) < _DEPENDENT:
        return None
    core = lower.T * lengths
    energies, vectors = (found.flip(-1) for found in torch.linalg.eigh(core @ left @ core.T))
    s, v = energies.clamp(min=0).sqrt(), vectors[:, :rank]
    parts = float(torch.linalg.vector_norm(weights * lengths))
    clear = float(s[rank - 1]) > _FAINT * max(float(s[0]), parts)
    if not clear or float(energies[rank:].sum()) < _LEFT_OUT * float(energies.sum()):
        return None
    return Decomposition(
        s=s,
        left=lambda directions: up @ directions.to(up),
        # Along the rows of `down`, which are those of the file too.
        right=lambda directions: (directions.T.to(down) @ down).T,
        cores=(core.T @ v / s[:rank], (inverse.T / lengths[:, None]) @ v),
        like=up,
    )


def _in_range(lengths: Tensor) -> bool:
    low, high = _RANGE
    return bool(((lengths > low) & (lengths < high)).all())
