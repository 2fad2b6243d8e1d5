"""A few elements, spread over a matrix."""

import math

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors

COUNT = 2**15
SIDE = 256
_GROUPS = 32


def sample_of(change: Factors | Tensor, *, count: int = COUNT, signed: bool = False) -> Tensor:
    """Return magnitudes of about `count` elements of a matrix, some more than once if it is small.

    They lie in small blocks of rows and columns that are spread evenly, other ones in each block: a
    single block would say as much of its few rows and columns as of the matrix.

    Args:
        change: [m, n].
        count: of elements.
        signed: return the elements themselves.

    Returns:
        [groups, elements of each].
    """
    rows, columns = change.shape
    side = math.isqrt(max(1, count // _GROUPS))
    # A few rows take more columns, and the other way round.
    tall = min(rows, max(side, count // (_GROUPS * max(1, columns))))
    wide = min(columns, max(side, count // (_GROUPS * max(1, rows))))
    at_rows, at_columns = _spread(rows, tall, 1), _spread(columns, wide, 5)
    if isinstance(change, Factors):
        down = change.down[:, at_columns.flatten()].reshape(-1, _GROUPS, wide).transpose(0, 1)
        found = torch.bmm(change.up[at_rows], down)
    else:
        found = change[at_rows[:, :, None], at_columns[:, None, :]]
    return (found if signed else found.abs()).flatten(1)


def _spread(length: int, side: int, turn: int) -> Tensor:
    """Return the rows [groups, side] of a matrix that each group takes."""
    group = torch.arange(_GROUPS)[:, None] * turn % _GROUPS
    slots = torch.arange(side)[None] * _GROUPS + group
    return slots * length // (side * _GROUPS)


def elements_of(change: Factors | Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the elements of a matrix at some rows and columns, [rows, columns] in fp64."""
    if isinstance(change, Factors):
        return change.up[rows].double() @ change.down[:, columns].double()
    return change[rows][:, columns].double()


def places_of(shape: tuple[int, int], *, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Return rows and columns spread evenly over a matrix, at most `side` of each."""
    rows, columns = (
        torch.linspace(0, length - 1, min(length, side)).round().long() for length in shape
    )
    return rows, columns
