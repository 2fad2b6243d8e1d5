"""The ΔW of several LoRAs at one place: made in one block, free to be overwritten."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Place, part, places, sides_of
from lorakit.methods.delta import Delta

Tiles = Callable[[], Iterator[tuple[Place, Tensor]]]
"""Makes a matrix again, tile by tile, with the same bits each time."""
Thin = Callable[[Tensor, Place], None]
"""Takes away what a method leaves out of a tile of one LoRA's ΔW, in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The tiles of a module: the same whoever asks, so that a threshold meets the bits it is of.

    Args:
        shape: (m, n) of the matrices.
        sides: rows and columns of a tile.
        dtype: of the arithmetic, fp32 or fp64.
    """

    shape: tuple[int, int]
    sides: tuple[int, int]
    dtype: torch.dtype

    def places(self) -> Iterator[Place]:
        """Yield the place of every tile."""
        return places(self.shape, self.sides)


def grid_of(deltas: Sequence[Delta], *, whole_rows: bool = False) -> Grid:
    """Return the tiles of a module, in the widest dtype among its ΔW.

    Args:
        deltas: of one module.
        whole_rows: whether a tile has to hold all columns of its rows.
    """
    shape = deltas[0].shape
    kinds = [d.change.up.dtype if isinstance(d.change, Factors) else d.change.dtype for d in deltas]
    return Grid(
        shape=shape,
        sides=sides_of(shape, whole_rows=whole_rows),
        dtype=reduce(torch.promote_types, kinds, torch.float32),
    )


def stacked(changes: Sequence[Factors | Tensor], grid: Grid, place: Place) -> Tensor:
    """Make the tiles [T, rows, columns] that matrices have at a place, anew each time."""
    sides = [side.stop - side.start for side in place]
    stack = torch.empty((len(changes), *sides), dtype=grid.dtype)
    for tile, change in zip(stack, changes, strict=True):
        if isinstance(change, Factors) and change.up.dtype == grid.dtype:
            torch.mm(change.up[place[0]], change.down[:, place[1]], out=tile)
        else:
            tile.copy_(part(change, place))
    return stack


def magnitudes(change: Factors | Tensor, grid: Grid) -> Tiles:
    """Return what makes |ΔW| again and again, tile by tile."""

    def made() -> Iterator[tuple[Place, Tensor]]:
        for place in grid.places():
            yield place, stacked([change], grid, place)[0].abs_()

    return made
