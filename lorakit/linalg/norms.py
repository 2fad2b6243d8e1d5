"""Norms of a large matrix: Frobenius, and spectral by Lanczos' method."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg.masks import gaussian

TOLERANCE = 1e-4
_BLOCK, _MOST_STEPS = 4, 60
_SMALL = 128
_NOISE = 16 * float(torch.finfo(torch.float32).eps)
_TINY, _HUGE = 1e-12, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectral:
    """A spectral norm, how far below the true one it is estimated to be, relative, and the steps.

    No steps: it was found exactly.
    """

    value: float
    off: float
    steps: int


def frobenius(matrix: Tensor) -> float:
    """Return ‖matrix‖ of a matrix [m, n] in fp32: rows in fp32, their sum in fp64.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    # MPS has no fp64.
    rows = torch.linalg.vector_norm(matrix, dim=1).cpu().double()
    size = float(torch.linalg.vector_norm(rows))
    if not _TINY < size < _HUGE:
        size = float(torch.linalg.vector_norm(matrix.cpu(), dtype=torch.float64))
    if not math.isfinite(size):
        raise NumericsError("holds NaN or infinity; lorakit verify names all such tensors")
    return size


def spectral(
    matrix: Tensor, *, frobenius: float, seed_name: str, tolerance: float = TOLERANCE
) -> Spectral:
    """Return the largest singular value of a matrix.

    Args:
        matrix: [m, n] in fp32, any strides, finite.
        frobenius: its Frobenius norm, which brings all products near 1.
        seed_name: of the random start.
        tolerance: the estimated relative error to stop at.

    Source: Lanczos (1950), in blocks, on the Gram matrix of the shorter side, which is never
    formed; with every direction kept, so that none comes back, it takes a tenth of the power
    method's steps.

    - A block, because a single start may happen to be orthogonal to what is sought.
    - The value is a Rayleigh quotient: at most the true one, up to rounding.

    Cost: 2 products with four directions for each of 5 to 30 steps, in 8 · m · n flops each; for up
    to 128 rows or columns the Gram matrix.
    """
    if frobenius == 0.0:
        return Spectral(value=0.0, off=0.0, steps=0)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if len(wide) <= _SMALL:
        sides = wide.cpu().double() / frobenius
        square = float(torch.linalg.eigvalsh(sides @ sides.T)[-1])
        return Spectral(value=math.sqrt(max(square, 0.0)) * frobenius, off=0.0, steps=0)
    square, off, steps = _lanczos(wide, frobenius, seed_name, tolerance)
    return Spectral(value=math.sqrt(square) * frobenius, off=off, steps=steps)


def _lanczos(
    wide: Tensor, size: float, seed_name: str, tolerance: float
) -> tuple[float, float, int]:
    """Return the largest eigenvalue of wide @ wide.T / size², what it may miss, and the steps."""
    capacity = min(_BLOCK * _MOST_STEPS, len(wide))
    basis = wide.new_zeros(capacity, len(wide))
    core = torch.zeros(capacity, capacity, dtype=torch.float64)
    start = torch.linalg.qr(gaussian(seed_name, (_BLOCK, len(wide))).T.double()).Q.T
    basis[:_BLOCK] = start.to(basis)
    known, newest, square, off, steps = _BLOCK, slice(0, _BLOCK), 0.0, math.inf, 0
    while newest.start < newest.stop and off > tolerance:
        rows = (basis[newest] @ wide / size) @ wide.T / size
        inside = _taken_out(rows, basis[:known])
        # What rounding left of the known directions would bring the largest one back.
        inside += _taken_out(rows, basis[:known])
        core[:known, newest] = inside
        core[newest, :known] = inside.T
        values, vectors = torch.linalg.eigh(core[:known, :known])
        square, steps = float(values[-1]), steps + 1
        fresh, lengths = _orthonormal(rows, _NOISE * square)
        off = _off(values, float(torch.linalg.vector_norm(lengths @ vectors[newest, -1])))
        fresh = fresh[: capacity - known]
        newest = slice(known, known + len(fresh))
        basis[newest] = fresh
        known = newest.stop
    return square, off, steps


def _taken_out(rows: Tensor, known: Tensor) -> Tensor:
    """Take out of `rows` [w, m] what lies in the basis [k, m]; return it as coefficients [k, w]."""
    inside = known @ rows.T
    rows -= inside.T @ known
    return inside.double().cpu()


def _orthonormal(rows: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows that span those longer than noise, and what makes `rows` of them.

    Returns:
        [f, m], and C [f, w] in fp64 on the CPU: rows = C.T @ fresh.
    """
    wide = rows.cpu().double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    lengths = values.clamp(min=0).sqrt()
    fresh = (lengths > noise).nonzero().flatten()
    turn = vectors[:, fresh]
    return (turn / lengths[fresh]).T.to(rows) @ rows, (turn * lengths[fresh]).T


def _off(values: Tensor, residual: float) -> float:
    """Return what the root of the largest eigenvalue may miss, relative.

    An eigenvalue lies within the residual, and within residual² / gap where the others are known.
    """
    square = float(values[-1])
    gap = square - float(values[-2])
    nearest = min(residual, residual**2 / gap) if gap > 0 else residual
    return nearest / square / 2
