"""A few elements, spread over a matrix."""

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors

SIDE = 256


def sample_of(change: Factors | Tensor, *, side: int = SIDE) -> Tensor:
    """Return magnitudes of some rows and columns of a matrix.

    Args:
        change: [m, n].
        side: how many rows and how many columns at the most.
    """
    rows, columns = places_of((change.shape[0], change.shape[1]), side=side)
    if isinstance(change, Factors):
        return (change.up[rows] @ change.down[:, columns]).abs()
    return change[rows][:, columns].abs()


def places_of(shape: tuple[int, int], *, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Return rows and columns spread evenly over a matrix, at most `side` of each."""
    rows, columns = (
        torch.linspace(0, length - 1, min(length, side)).round().long() for length in shape
    )
    return rows, columns
