"""Which elements of a matrix are the largest: the exact k-th magnitude, never sorting it whole."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.linalg.tiles import Place

Tiles = Callable[[], Iterator[tuple[Place, Tensor]]]
"""Makes the magnitudes of a matrix again, tile by tile, with the same bits each time."""
_SMALL = 2**20
"""Elements that may be held at once."""
_DEVIATIONS = 5.0
_BINS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The elements above a magnitude, and those equal to it up to a place in row-major order.

    Args:
        value: the smallest magnitude that is kept.
        last: the position of the last one that equals it and is kept; None: all of them are.
    """

    value: float
    last: int | None = None

    def keeps(self, magnitude: Tensor, place: Place, columns: int) -> Tensor:
        """Return which elements of a tile are kept.

        Args:
            magnitude: the tile.
            place: where it lies.
            columns: of the whole matrix.
        """
        if self.last is None:
            return magnitude >= self.value
        equal = (magnitude == self.value) & (_positions(magnitude, place, columns) <= self.last)
        return (magnitude > self.value) | equal


NOTHING, EVERYTHING = Cut(value=math.inf), Cut(value=0.0)


def largest(tiles: Tiles, count: int, *, shape: tuple[int, int], sample: Tensor) -> Cut:
    """Find the `count` largest magnitudes of a matrix [m, n]; of equal ones the first come first.

    Args:
        tiles: makes the magnitudes.
        count: how many are kept.
        shape: (m, n).
        sample: some of the magnitudes, spread over the matrix.
    """
    whole = shape[0] * shape[1]
    if count <= 0:
        return NOTHING
    if count >= whole:
        return EVERYTHING
    value, quota, equal = threshold(tiles, count, whole=whole, sample=sample)
    # Zeros are the same kept or not.
    if quota == equal or value == 0.0:
        return Cut(value=value)
    return Cut(value=value, last=_last(tiles, value, quota, shape[1]))


def threshold(tiles: Tiles, count: int, *, whole: int, sample: Tensor) -> tuple[float, int, int]:
    """Find the magnitude that `count` elements reach.

    A sample brackets it; one pass counts what lies above the bracket and collects the little inside
    it, in which the threshold is found exactly. Where the sample misled, the bracket is narrowed by
    counting instead.

    Args:
        tiles: makes the magnitudes.
        count: from 1 to `whole`.
        whole: how many elements there are.
        sample: some of the magnitudes.

    Returns:
        The count-th largest magnitude, how many that equal it are among them, and how many that
        equal it there are.
    """
    found = _selected(tiles, count, _bracket(sample, count / whole, whole))
    return found or _narrowed(tiles, count)


def _bracket(sample: Tensor, share: float, whole: int) -> tuple[float, float]:
    if whole <= _SMALL:
        return 0.0, math.inf
    ranked = sample.flatten().sort(descending=True).values
    middle = share * len(ranked)
    spread = _DEVIATIONS * math.sqrt(max(middle * (1 - share), 1.0)) + 1
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    high = float(ranked[first]) if first >= 0 else math.inf
    return (float(ranked[last]) if last < len(ranked) else 0.0), high


def _selected(
    tiles: Tiles, count: int, bracket: tuple[float, float]
) -> tuple[float, int, int] | None:
    """Return the threshold, how many that equal it are kept, and how many there are."""
    low, high = bracket
    above, held, inside = 0, 0, []
    for _, tile in tiles():
        over = tile >= high
        above += int(torch.count_nonzero(over))
        found = tile[(tile >= low).logical_xor_(over)] if low < high else tile[:0].flatten()
        held += len(found)
        if held > _SMALL:
            return None
        inside.append(found)
    rank = count - above
    if not 0 < rank <= held:
        return None
    values = torch.cat(inside)
    value = values.kthvalue(held - rank + 1).values
    more, equal = (int(torch.count_nonzero(t)) for t in (values > value, values == value))
    return float(value), rank - more, equal


def _narrowed(tiles: Tiles, count: int) -> tuple[float, int, int]:
    """Find the threshold by counting in ever finer ranges of the numbers' bits."""
    kind = next(tile.dtype for _, tile in tiles())
    bits = torch.int64 if kind == torch.float64 else torch.int32
    low, high = 0, int(torch.tensor(math.inf, dtype=kind).view(bits))
    above = 0
    while True:
        step = max(1, -(-(high - low) // _BINS))
        counts = torch.zeros(_BINS, dtype=torch.int64)
        for _, tile in tiles():
            # Magnitudes are ordered as their bits are.
            place = tile.contiguous().view(bits).flatten().long() - low
            place = place[(place >= 0) & (place < high - low)] // step
            counts += torch.bincount(place, minlength=_BINS)
        sums = above + counts.flip(0).cumsum(0)
        index = _BINS - 1 - int((sums < count).sum())
        above = int(sums[_BINS - 1 - index] - counts[index])
        low, high = low + index * step, min(high, low + (index + 1) * step)
        if high - low <= 1:
            value = float(torch.tensor(low, dtype=bits).view(kind))
            return value, count - above, int(counts[index])


def _last(tiles: Tiles, value: float, quota: int, columns: int) -> int:
    found = [_positions(tile, place, columns)[tile == value] for place, tile in tiles()]
    return int(torch.cat(found).kthvalue(quota).values)


def _positions(tile: Tensor, place: Place, columns: int) -> Tensor:
    rows = torch.arange(place[0].start, place[0].start + tile.shape[0])
    return rows[:, None] * columns + torch.arange(place[1].start, place[1].start + tile.shape[1])


def largest_of_rows(magnitude: Tensor, first: int, count: int) -> Tensor:
    """Return which `count` elements of each row follow the `first` largest; equal ones in order.

    Args:
        magnitude: whole rows.
        first: how many of the largest are left out.
        count: how many are kept.
    """
    order = magnitude.sort(dim=1, descending=True, stable=True).indices
    keeps = torch.zeros(magnitude.shape, dtype=torch.bool)
    return keeps.scatter_(1, order[:, first : first + count], True)
