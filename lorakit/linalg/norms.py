"""Norms of a large matrix: Frobenius, and spectral by Lanczos' method."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg.masks import gaussian

TOLERANCE = 1e-4
_LEAST_STEPS, _MOST_STEPS = 8, 160
_TINY, _HUGE = 1e-12, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectral:
    """A spectral norm, how far below the true one it may be, relative, and the steps it took."""

    value: float
    off: float
    steps: int


def frobenius(matrix: Tensor) -> float:
    """Return ‖matrix‖ of a matrix [m, n] in fp32: rows in fp32, their sum in fp64.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    rows = torch.linalg.vector_norm(matrix, dim=1).double()
    size = float(torch.linalg.vector_norm(rows))
    if not _TINY < size < _HUGE:
        size = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if not math.isfinite(size):
        raise NumericsError("holds NaN or infinity; check the model for damage")
    return size


def spectral(
    matrix: Tensor,
    *,
    frobenius: float,
    seed_name: str,
    tolerance: float = TOLERANCE,
) -> Spectral:
    """Return the largest singular value of a matrix.

    Args:
        matrix: [m, n] in fp32, any strides, finite.
        frobenius: its Frobenius norm, which brings all products near 1.
        seed_name: of the random start.
        tolerance: the estimated relative error to stop at.

    Source: Lanczos (1950), on the Gram matrix of the shorter side, which is never formed; with
    every direction kept, so that none comes back, it takes a tenth of the power method's steps.

    - The value is a Rayleigh quotient: at most the true one, up to rounding.
    - The residual ρ of its direction bounds the error by ρ, and by ρ² / gap, which is estimated.

    Cost: 2 products with a vector for each of 8 to 60 steps; more where the largest singular values
    lie close together.
    """
    if frobenius == 0.0:
        return Spectral(value=0.0, off=0.0, steps=0)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    most = min(len(wide), _MOST_STEPS)
    basis = wide.new_zeros(most, len(wide))
    core = torch.zeros(most + 1, most + 1, dtype=torch.float64)
    direction = gaussian(seed_name, (len(wide),)).to(wide)
    square, off, steps = 0.0, math.inf, 0
    # A few steps may take two close values for one.
    while steps < most and (off > tolerance or steps < _LEAST_STEPS):
        basis[steps] = direction / torch.linalg.vector_norm(direction)
        steps += 1
        known = basis[:steps]
        direction = wide @ ((known[-1] @ wide) / frobenius) / frobenius
        along = known @ direction
        direction = direction - along @ known
        # What rounding left of the known directions would bring the largest one back.
        again = known @ direction
        direction = direction - again @ known
        core[steps - 1, steps - 1] = float(along[-1] + again[-1])
        rest = float(torch.linalg.vector_norm(direction))
        core[steps - 1, steps] = core[steps, steps - 1] = rest
        square, off = _leading(core[:steps, :steps], rest)
        if rest <= torch.finfo(wide.dtype).eps * square:
            break
    return Spectral(value=math.sqrt(square) * frobenius, off=off, steps=steps)


def _leading(core: Tensor, rest: float) -> tuple[float, float]:
    """Return the largest eigenvalue, and what its square root may miss, relative.

    Args:
        core: the matrix in the basis so far, [k, k].
        rest: how long the part of its last column is that lies outside.
    """
    values, vectors = torch.linalg.eigh(core)
    square = float(values[-1])
    residual = rest * abs(float(vectors[-1, -1])) / square
    gap = (square - float(values[-2])) / square if len(values) > 1 else 0.0
    # One step tells nothing of a gap; that of a multiple value is rounding.
    off = min(residual, residual**2 / gap) if gap > 0 else residual
    return square, off / 2
