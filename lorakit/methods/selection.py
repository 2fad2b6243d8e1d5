"""The exact k-th largest of very many numbers that are made a part at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lorakit.linalg.tiles import Place
from lorakit.methods.stacking import Tiles

Sample = Callable[[], Tensor]
"""Draws some of the numbers, [groups, some of each]."""
_SMALL = 2**17
"""Of so few numbers all are held."""
_HELD = 2**24
"""Numbers that may be held at once."""
_DEVIATIONS = 4.0
_DIGIT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The k-th largest of some numbers.

    Args:
        value: itself.
        quota: how many that equal it are among the k largest.
        equal: how many that equal it there are.
        places: where those are, tile by tile: the tile's place, and their positions in the tile;
            None where they are too many.
    """

    value: float
    quota: int
    equal: int
    places: list[tuple[Place, np.ndarray]] | None = None


def thresholds(
    tiles: Tiles, ranks: tuple[int, ...], *, whole: int, sample: Sample
) -> list[Threshold]:
    """Find the k-th largest of numbers ≥ 0, exactly, for some k.

    A sample brackets each; one pass counts what lies above the bracket and collects the little
    inside it, in which the answer is found. Where the sample misled or very many are equal, the
    numbers are counted by the digits of their bits instead: two passes in fp32, four in fp64.

    Args:
        tiles: makes the numbers, all of one dtype.
        ranks: each k, from 1 to `whole`.
        whole: how many numbers there are.
        sample: draws some of them, where they are many.
    """
    drawn = sample() if whole > _SMALL else None
    brackets = [_bracket(drawn, rank / whole) for rank in ranks]
    found = _collected(tiles, ranks, brackets)
    return [
        _counted(tiles, rank) if one is None else one
        for rank, one in zip(ranks, found, strict=True)
    ]


def _bracket(sample: Tensor | None, share: float) -> tuple[float, float]:
    """Return numbers between which the one that the share reaches lies, all but certainly."""
    if sample is None or not sample.numel():
        return 0.0, math.inf
    groups = sample.double().reshape(len(sample), -1).numpy()
    values = groups.reshape(-1)
    middle = (1 - share) * len(values)
    near = int(min(middle, len(values) - 1))
    shares = np.mean(groups > np.partition(values, near)[near], axis=1)
    # Elements of one row are no draws by themselves: how far the groups differ tells.
    off = max(math.sqrt(share * (1 - share) / len(values)), shares.std() / math.sqrt(len(shares)))
    spread = _DEVIATIONS * off * len(values) + 1
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    low = float(np.partition(values, first)[first]) if first >= 0 else 0.0
    return low, float(np.partition(values, last)[last]) if last < len(values) else math.inf


def _collected(
    tiles: Tiles, ranks: tuple[int, ...], brackets: list[tuple[float, float]]
) -> list[Threshold | None]:
    gathered = [_Gathered() for _ in ranks]
    for place, tile in tiles():
        values = tile.numpy().reshape(-1)
        for (low, high), found in zip(brackets, gathered, strict=True):
            over, reached = values > high, values >= low
            found.above += np.count_nonzero(over)
            if found.held <= _HELD:
                inside = np.flatnonzero(np.logical_xor(over, reached, out=over)).astype(np.int32)
                found.held += len(inside)
                found.parts.append((place, inside, values[inside]))
    return [found.ranked(rank) for rank, found in zip(ranks, gathered, strict=True)]


@dataclass(slots=True)
class _Gathered:
    """What lies above a bracket, and inside it: place, positions and values, tile by tile."""

    above: int = 0
    held: int = 0
    parts: list[tuple[Place, np.ndarray, np.ndarray]] = field(default_factory=list)

    def ranked(self, rank: int) -> Threshold | None:
        """Return the k-th largest, None where it is not inside."""
        rank -= self.above
        if not 0 < rank <= self.held <= _HELD:
            return None
        values = np.concatenate([values for _, _, values in self.parts])
        value = np.partition(values, self.held - rank)[self.held - rank]
        places = [(place, inside[values == value]) for place, inside, values in self.parts]
        return Threshold(
            value=float(value),
            quota=rank - int(np.count_nonzero(values > value)),
            equal=sum(len(inside) for _, inside in places),
            places=places,
        )


def _counted(tiles: Tiles, rank: int) -> Threshold:
    """Find the k-th largest digit by digit: numbers ≥ 0 are ordered as their bits are."""
    kind = next(tile.numpy().dtype for _, tile in tiles())
    word = np.dtype(f"u{kind.itemsize}")
    prefix, above, equal = 0, 0, 0
    for shift in range(8 * word.itemsize - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(2**_DIGIT, dtype=np.int64)
        for _, tile in tiles():
            digits = tile.numpy().reshape(-1).view(word) >> word.type(shift)
            digits = digits[digits >> word.type(_DIGIT) == prefix] & word.type(2**_DIGIT - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=2**_DIGIT)
        reached = above + np.cumsum(counts[::-1])
        index = int(np.searchsorted(reached, rank))
        digit = 2**_DIGIT - 1 - index
        equal = int(counts[digit])
        above = int(reached[index]) - equal
        prefix = prefix << _DIGIT | digit
    value = float(np.array(prefix, dtype=word).view(kind))
    return Threshold(value=value, quota=rank - above, equal=equal)
