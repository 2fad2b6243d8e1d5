"""Which elements of a matrix are kept by their magnitude: the largest, less the very largest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Place
from lorakit.methods.method import Method
from lorakit.methods.sampling import sample_of
from lorakit.methods.selection import Sample, Threshold, thresholds
from lorakit.methods.stacking import Grid, Thin, Tiles, magnitudes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The elements above a magnitude, and those equal to it up to a place in row-major order.

    Args:
        value: the smallest magnitude that is kept.
        last: the position of the last one that equals it and is kept; None: all of them are.
        columns: of the whole matrix.
    """

    value: float
    last: int | None = None
    columns: int = 1

    def kept(self, tile: Tensor, place: Place, *, out: Tensor | None = None) -> Tensor:
        """Return a part of the matrix with zeros for what is not kept.

        Args:
            tile: the part.
            place: where it lies.
            out: where to write it; may be `tile` itself.
        """
        # What is no larger than the number below the threshold becomes zero, in one step.
        kind = tile.numpy().dtype
        below = float(np.nextafter(np.array(self.value, kind), np.array(0, kind)))
        if self.value in (0.0, math.inf):
            return torch.mul(tile, float(self.value == 0.0), out=out)
        found: Tensor = torch.hardshrink(tile, below, out=out)
        if self.last is not None:
            self._drop_equal(found.numpy(), place)
        return found

    def _drop_equal(self, tile: np.ndarray, place: Place) -> None:
        row, column = divmod(self.last or 0, self.columns)
        first = max(0, row - place[0].start)
        equal = np.abs(tile[first:]) == self.value
        if place[0].start <= row < place[0].stop:
            equal[0, : max(0, column + 1 - place[1].start)] = False
        tile[first:].flat[np.flatnonzero(equal)] = 0.0


NOTHING, EVERYTHING = Cut(value=math.inf), Cut(value=0.0)


def largest(
    tiles: Tiles, counts: tuple[int, ...], *, shape: tuple[int, int], sample: Sample
) -> list[Cut]:
    """Find the largest magnitudes of a matrix [m, n]; of equal ones the first come first.

    Args:
        tiles: makes the magnitudes.
        counts: how many are kept, one a cut.
        shape: (m, n).
        sample: draws some of the magnitudes, spread over the matrix.
    """
    whole = shape[0] * shape[1]
    ranks = tuple(count for count in counts if 0 < count < whole)
    found = iter(thresholds(tiles, ranks, whole=whole, sample=sample) if ranks else ())
    return [
        _cut(tiles, next(found), shape) if 0 < count < whole else (EVERYTHING if count else NOTHING)
        for count in counts
    ]


def _cut(tiles: Tiles, at: Threshold, shape: tuple[int, int]) -> Cut:
    # Zeros are the same kept or not.
    if at.quota == at.equal or at.value == 0.0:
        return Cut(value=at.value)
    found = _row_by_row(tiles, at, shape) if at.places is None else _listed(at, at.places, shape[1])
    return Cut(value=at.value, last=found, columns=shape[1])


def _listed(at: Threshold, places: Sequence[tuple[Place, np.ndarray]], columns: int) -> int:
    """Return the position of the last of the equal elements that are kept, from where they are."""
    found = []
    for (rows, across), inside in places:
        row, column = np.divmod(inside.astype(np.int64), across.stop - across.start)
        found.append((row + rows.start) * columns + column + across.start)
    return int(np.partition(np.concatenate(found), at.quota - 1)[at.quota - 1])


def _row_by_row(tiles: Tiles, at: Threshold, shape: tuple[int, int]) -> int:
    """Return the same where they are too many: find the row, then the element in it."""
    equal = np.zeros(shape[0], dtype=np.int64)
    for place, tile in tiles():
        equal[place[0]] += np.count_nonzero(tile.numpy() == at.value, axis=1)
    reached = np.cumsum(equal)
    row = int(np.searchsorted(reached, at.quota))
    left = at.quota - int(reached[row] - equal[row])
    found = [
        np.flatnonzero(tile[row - place[0].start].numpy() == at.value) + place[1].start
        for place, tile in tiles()
        if place[0].start <= row < place[0].stop
    ]
    return row * shape[1] + int(np.concatenate(found)[left - 1])


def trimming(change: Factors | Tensor, method: Method, grid: Grid, cut: float | None) -> Thin:
    """Return what leaves of a matrix the elements that a method keeps.

    Args:
        change: ΔW.
        method: with every parameter set.
        grid: the tiles in which ΔW is made.
        cut: the magnitude that is kept, where it was found over the whole model.
    """
    if method.scope == "row":
        return partial(_thin_rows, numbers(method, grid.shape[1]))
    if cut is not None:
        return partial(_thin, Cut(value=cut), NOTHING)
    count, outliers = numbers(method, grid.shape[0] * grid.shape[1])
    low, high = largest(
        magnitudes(change, grid),
        (count + outliers, outliers),
        shape=grid.shape,
        sample=partial(sample_of, change),
    )
    return partial(_thin, low, high)


def _thin(low: Cut, high: Cut, tile: Tensor, place: Place) -> None:
    # A number less itself is exactly zero.
    outliers = None if high is NOTHING else high.kept(tile, place)
    if low is not EVERYTHING:
        low.kept(tile, place, out=tile)
    if outliers is not None:
        tile.sub_(outliers)


def numbers(method: Method, whole: int) -> tuple[int, int]:
    """Return how many elements are kept, and how many of the largest are left out.

    Fewer outliers are left out where the density would not be reached else.

    Args:
        method: with every parameter set.
        whole: how many elements there are.
    """
    # mergekit keeps an element at least by magnitude, but not of breadcrumbs; PEFT never does.
    none = method.flavor == "peft" or (method.flavor == "mergekit" and method.gamma is not None)
    least = 0 if none else 1
    count = max(least, int((method.density or 1.0) * whole))
    return count, min(int((method.gamma or 0.0) * whole), whole - count)


def _thin_rows(counts: tuple[int, int], tile: Tensor, place: Place) -> None:
    del place
    count, outliers = counts
    tile.mul_(largest_of_rows(tile.abs(), outliers, count))


def largest_of_rows(magnitude: Tensor, first: int, count: int) -> Tensor:
    """Return which `count` elements of each row follow the `first` largest; equal ones in order.

    Args:
        magnitude: whole rows.
        first: how many of the largest are left out.
        count: how many are kept.
    """
    values = magnitude.numpy()
    keeps = _first_of_rows(values, first + count)
    if first:
        keeps &= ~_first_of_rows(values, first)
    return torch.from_numpy(keeps)


def _first_of_rows(values: np.ndarray, count: int) -> np.ndarray:
    columns = values.shape[1]
    if not 0 < count < columns:
        return np.full(values.shape, count > 0)
    least = np.partition(values, columns - count, axis=1)[:, columns - count, None]
    keeps: np.ndarray = values >= least
    for row in np.flatnonzero(np.count_nonzero(keeps, axis=1) > count):
        surplus = int(np.count_nonzero(keeps[row])) - count
        keeps[row, np.flatnonzero(values[row] == least[row])[-surplus:]] = False
    return keeps
