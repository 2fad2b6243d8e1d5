"""Matrices that are made a tile at a time, so that a dense ΔW need never be whole in memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, Framed, norm
from lorakit.linalg.factored import dense as product

Place = tuple[slice, slice]
"""Rows and columns of a tile."""
BLOCK = 2**18
"""Elements of a tile on the CPU: in float64 it stays in the cache."""
COLUMNS = 1024
"""With wider tiles of few rows a product mostly copies `down`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiled:
    """A matrix [m, n] that is made tile by tile, whenever it is asked for, with the same bits.

    Args:
        shape: (m, n).
        sides: rows and columns of a tile, fixed: no budget and no thread count changes a bit.
        tile: makes the part at a place, in fp32 or fp64.
    """

    shape: tuple[int, int]
    sides: tuple[int, int]
    tile: Callable[[Place], Tensor]

    def places(self) -> Iterator[Place]:
        """Yield the place of every tile, those of one column of tiles after another."""
        return places(self.shape, self.sides)


Change = Factors | Framed | Tensor | Tiled
"""A ΔW: as factors, as a core between bases, as a matrix [out, in · kh · kw], or made by tiles."""


def sides_of(shape: tuple[int, int], *, whole_rows: bool = False) -> tuple[int, int]:
    """Return rows and columns of the tiles of a matrix.

    Args:
        shape: (m, n).
        whole_rows: whether a tile has to hold all columns of its rows.
    """
    rows, columns = shape
    columns = columns if whole_rows else min(columns, COLUMNS)
    return max(1, min(rows, BLOCK // max(1, columns))), max(1, columns)


def places(shape: tuple[int, int], sides: tuple[int, int]) -> Iterator[Place]:
    """Yield rows and columns of every tile, those of one column of tiles after another."""
    for left in range(0, shape[1], sides[1]):
        columns = slice(left, min(left + sides[1], shape[1]))
        for top in range(0, shape[0], sides[0]):
            yield slice(top, min(top + sides[0], shape[0])), columns


def part(change: Change, place: Place) -> Tensor:
    """Return what a ΔW is at a place; of a `Tiled` only one of its own tiles."""
    if isinstance(change, Framed):
        change = change.factors()
    if isinstance(change, Factors):
        return change.up[place[0]] @ change.down[:, place[1]]
    return change.tile(place) if isinstance(change, Tiled) else change[place]


def dense(change: Change) -> Tensor:
    """Return a ΔW as one matrix [m, n]."""
    if isinstance(change, Framed):
        change = change.factors()
    if isinstance(change, Factors):
        return product(change)
    if isinstance(change, Tensor):
        return change
    whole: Tensor | None = None
    for place in change.places():
        found = change.tile(place)
        if whole is None:
            whole = torch.empty(change.shape, dtype=found.dtype)
        whole[place] = found
    return torch.empty(change.shape) if whole is None else whole


def difference(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Return first − second [m, n] in fp32, of matrices in any float dtypes, in `out` if given.

    Row block by row block: the second matrix is widened in the cache, never as a whole.
    """
    result = first.new_empty(first.shape, dtype=torch.float32) if out is None else out
    for rows in _blocks_of_rows(first):
        result[rows].copy_(first[rows]).sub_(second[rows].to(first.device, torch.float32))
    return result


def subtracted(pairs: Iterable[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
    """Return the differences of pairs of blocks, one after another, in `out` [m, n] of fp32."""
    flat, start = out.view(-1), 0
    for first, second in pairs:
        place = flat[start : start + len(first)]
        place.copy_(first).sub_(summable(second))
        start += len(first)
    return out


def squared_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return Σ (first − second)² over pairs of blocks, in fp32 within a block, in fp64 beyond."""
    parts = (first.to(torch.float32, copy=True).sub_(summable(second)) for first, second in pairs)
    return math.fsum(float(torch.dot(part, part)) for part in parts)


def summable(block: Tensor) -> Tensor:
    """Return a block as it is, fp8 in fp32: of that torch knows no sums, extremes, comparisons."""
    # Others torch widens by itself, in half the time.
    return block if block.dtype.itemsize > 1 else block.float()


def distance(first: Tensor, second: Tensor) -> float:
    """Return ‖first − second‖ of matrices [m, n] in any float dtypes, row block by row block."""
    parts = (difference(first[rows], second[rows]) for rows in _blocks_of_rows(first))
    return math.hypot(*(float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in parts))


def _blocks_of_rows(matrix: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step)


def multiplied(change: Change, factor: float) -> Change:
    """Return factor · ΔW in the form that ΔW has."""
    if factor == 1.0:
        return change
    if isinstance(change, Factors):
        return Factors(up=change.up * factor, down=change.down)
    if isinstance(change, Framed):
        return replace(change, core=change.core * factor)
    if isinstance(change, Tensor):
        return change * factor
    tile = change.tile
    return replace(change, tile=lambda place: tile(place) * factor)


def size(change: Change) -> float:
    """Return ‖ΔW‖ (Frobenius), summed in fp64."""
    if isinstance(change, Factors):
        return norm(change)
    if isinstance(change, Framed):
        return float(torch.linalg.vector_norm(change.core))
    if isinstance(change, Tensor):
        return float(torch.linalg.vector_norm(change, dtype=torch.float64))
    tiles = (change.tile(place) for place in change.places())
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tiles))
