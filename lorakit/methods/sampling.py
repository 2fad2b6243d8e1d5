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
    rows, columns = (
        torch.linspace(0, length - 1, min(length, side)).round().long() for length in change.shape
    )
    if isinstance(change, Factors):
        return (change.up[rows] @ change.down[:, columns]).abs()
    return change[rows][:, columns].abs()
