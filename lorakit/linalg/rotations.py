"""Rotations from skew matrices, as PEFT makes them for OFT and BOFT."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Cayley:
    """How PEFT's OFT turns its numbers into rotations.

    Args:
        terms: of Neumann's series that stands for the inverse; None for the inverse itself.
        bound: what ‖Q‖ of a block may be, times √blocks; None for no bound.
    """

    terms: int | None = 5
    bound: float | None = None


def skew(numbers: Tensor) -> Tensor:
    """Return skew matrices [k, n, n] in fp64 from what is above their diagonals.

    Args:
        numbers: [k, n (n − 1) / 2], row by row.
    """
    size = side_of(numbers.shape[-1])
    rows, columns = torch.triu_indices(size, size, 1)
    found = torch.zeros(len(numbers), size, size, dtype=torch.float64)
    found[:, rows, columns] = numbers.double()
    return found - found.transpose(-1, -2)


def side_of(count: int) -> int:
    """Return the n of matrices with `count` = n (n − 1) / 2 numbers above the diagonal."""
    return int((1 + (1 + 8 * count) ** 0.5) / 2)


def rotations(numbers: Tensor, how: Cayley) -> Tensor:
    """Return PEFT's OFT rotations [k, n, n] in fp64, near-rotations where a series makes them.

    Args:
        numbers: [k, n (n − 1) / 2].
        how: the settings.

    Source: PEFT 0.21.2, `OFTRotationModule`, whose series is of the inverse's other sign.
    """
    turned = skew(numbers)
    if how.bound is not None:
        lengths = torch.linalg.matrix_norm(turned, keepdim=True)
        bound = how.bound / len(turned) ** 0.5
        turned = torch.where(lengths <= bound, turned, turned * (bound / lengths))
    if how.terms is None:
        return cayley(turned)
    found = torch.eye(turned.shape[-1], dtype=turned.dtype).expand_as(turned).clone()
    if how.terms > 1:
        found += 2 * turned
    if how.terms > 2:
        power = turned @ turned
        found += 2 * power
        for _ in range(3, how.terms - 1):
            power = power @ turned
            found += 2 * power
        found += power @ turned
    return found


def cayley(skewed: Tensor) -> Tensor:
    """Return (1 − Q)(1 + Q)⁻¹ of skew matrices [k, n, n]."""
    one = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device)
    found: Tensor = torch.linalg.solve(one + skewed, one - skewed, left=False)
    return found
