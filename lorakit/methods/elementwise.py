"""Methods that treat each element by itself: sparsify each ΔW, then sum or vote."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Change, Place, Tiled, dense, part, places, sides_of
from lorakit.methods.delta import Delta, alone
from lorakit.methods.dropping import dropped, dropped_by_rank, mask_name
from lorakit.methods.method import Method
from lorakit.methods.sampling import sample_of
from lorakit.methods.sce import sce
from lorakit.methods.trimming import EVERYTHING, NOTHING, Cut, largest, largest_of_rows
from lorakit.methods.voting import Ballot

Keep = Callable[[Tensor, Place], Tensor]
"""Returns what is left of a tile of one LoRA's ΔW."""


def elementwise(
    deltas: Sequence[Delta], *, method: Method, module: str, cuts: Mapping[str, float]
) -> Change:
    """Merge by a method that treats each element of the matrices by itself.

    Args:
        deltas: of one module; factors, whose product is made tile by tile, or matrices.
        method: with every parameter set.
        module: names the random streams.
        cuts: owner -> the magnitude below which elements of the whole model are trimmed, for
            `scope` "model".

    Returns:
        What makes the merged matrix tile by tile; the matrix itself where all inputs are matrices.

    Source: TIES 2306.01708, DARE 2311.03099, DELLA 2406.11617, Breadcrumbs 2312.06795.

    - every method sees ΔW, never a factor
    - where one LoRA acts alone nothing is trimmed or dropped (lorakit's flavor)

    Cost: the products twice where a threshold is over the whole matrix, once otherwise.
    """
    shape = deltas[0].shape
    sides = sides_of(shape, whole_rows=_needs_rows(method))
    if method.name == "sce":
        merged = Tiled(shape=shape, sides=sides, tile=sce(deltas, method, sides))
    else:
        keepers = _keepers(deltas, method, module, cuts, sides)
        tile = partial(_tile, deltas, keepers, _sum(deltas, method, sides))
        merged = Tiled(shape=shape, sides=sides, tile=tile)
    return merged if any(isinstance(d.change, Factors) for d in deltas) else dense(merged)


def _tile(
    deltas: Sequence[Delta],
    keepers: Sequence[Keep],
    combine: Callable[[Sequence[Tensor]], Tensor],
    place: Place,
) -> Tensor:
    made = [keep(part(d.change, place), place) for d, keep in zip(deltas, keepers, strict=True)]
    return combine(made)


def _needs_rows(method: Method) -> bool:
    return method.entry.random or method.scope == "row"


def _sum(
    deltas: Sequence[Delta], method: Method, sides: tuple[int, int]
) -> Callable[[Sequence[Tensor]], Tensor]:
    strengths = [delta.strength for delta in deltas]
    if method.entry.votes:
        return Ballot.of(method, strengths, cache(lambda: _majority(deltas, sides))).combined
    if method.normalize:
        # mergekit divides by Σ strength, which is 0 for 1 and -1.
        whole = sum(strengths if method.flavor == "mergekit" else map(abs, strengths)) or 1.0
        strengths = [strength / whole for strength in strengths]
    return partial(_weighted, strengths)


def _weighted(strengths: Sequence[float], kept: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(kept[0])
    for tile, strength in zip(kept, strengths, strict=True):
        total.add_(tile, alpha=strength)
    return total


def _majority(deltas: Sequence[Delta], sides: tuple[int, int]) -> float:
    """Return the sign that most elements of the sum have, as TIES settles a tie."""
    count = 0.0
    for place in places(deltas[0].shape, sides):
        count += float(sum(part(d.change, place) for d in deltas).sign().sum())  # type: ignore[union-attr]
    return -1.0 if count < 0 else 1.0


def _keepers(
    deltas: Sequence[Delta],
    method: Method,
    module: str,
    cuts: Mapping[str, float],
    sides: tuple[int, int],
) -> list[Keep]:
    if method.density in (None, 1.0) or (method.flavor == "lorakit" and alone(deltas)):
        return [lambda tile, place: tile] * len(deltas)
    if method.entry.random:
        return [_dropping(delta, method, module, sides) for delta in deltas]
    if method.scope == "row":
        return [partial(_trimmed_rows, method)] * len(deltas)
    return [_trimming(delta, method, cuts, sides) for delta in deltas]


def _dropping(delta: Delta, method: Method, module: str, sides: tuple[int, int]) -> Keep:
    name = mask_name(method.name, method.seed or 0, delta.owner, module)
    density, epsilon = method.density or 1.0, method.epsilon

    def drawn(tile: Tensor, place: Place) -> tuple[Tensor, Tensor | float]:
        if epsilon is None:
            return dropped(tile, place, name=name, density=density)
        return dropped_by_rank(tile, place, name=name, density=density, epsilon=epsilon)

    if method.flavor != "mergekit":

        def keep(tile: Tensor, place: Place) -> Tensor:
            mask, factor = drawn(tile, place)
            return torch.where(mask, tile * factor, 0.0).to(tile.dtype)

        return keep
    factor = _norm_factor(delta, drawn, sides)
    return lambda tile, place: torch.where(drawn(tile, place)[0], tile * factor, 0.0)


def _norm_factor(
    delta: Delta,
    drawn: Callable[[Tensor, Place], tuple[Tensor, Tensor | float]],
    sides: tuple[int, int],
) -> float:
    """Return what gives the kept elements the sum of magnitudes of all, as mergekit rescales."""
    before = after = 0.0
    for place in places(delta.shape, sides):
        tile = part(delta.change, place)
        before += float(tile.abs().double().sum())
        after += float(torch.where(drawn(tile, place)[0], tile, 0.0).abs().double().sum())
    return before / after if after else 1.0


def _trimming(
    delta: Delta, method: Method, cuts: Mapping[str, float], sides: tuple[int, int]
) -> Keep:
    columns = delta.shape[1]
    if method.scope == "model" and delta.owner in cuts:
        low, high = Cut(value=cuts[delta.owner]), NOTHING
    else:
        low, high = _band(delta, method, sides)

    def keep(tile: Tensor, place: Place) -> Tensor:
        magnitude = tile.abs()
        kept = low.keeps(magnitude, place, columns)
        if high is not NOTHING:
            kept &= ~high.keeps(magnitude, place, columns)
        return tile.mul_(kept) if _ours(delta) else tile * kept

    return keep


def _ours(delta: Delta) -> bool:
    """Tell whether a tile is a product that was made for it, not a view of the input."""
    return isinstance(delta.change, Factors)


def _band(delta: Delta, method: Method, sides: tuple[int, int]) -> tuple[Cut, Cut]:
    """Return the cut that keeps enough, and the one of the outliers that are left out."""
    count, outliers = counts(method, delta.shape[0] * delta.shape[1])
    find = partial(
        largest,
        partial(_magnitudes, delta, sides),
        shape=delta.shape,
        sample=sample_of(delta.change),
    )
    low = find(count + outliers) if count + outliers else EVERYTHING
    return low, find(outliers) if outliers else NOTHING


def counts(method: Method, whole: int) -> tuple[int, int]:
    """Return how many elements are kept, and how many of the largest are left out.

    Fewer outliers are left out where the density would not be reached else.
    """
    count = max(1, int((method.density or 1.0) * whole))
    return count, min(int((method.gamma or 0.0) * whole), whole - count)


def _trimmed_rows(method: Method, tile: Tensor, place: Place) -> Tensor:
    del place
    count, outliers = counts(method, tile.shape[1])
    return tile * largest_of_rows(tile.abs(), outliers, count)


def _magnitudes(delta: Delta, sides: tuple[int, int]) -> Iterator[tuple[Place, Tensor]]:
    for place in places(delta.shape, sides):
        yield place, part(delta.change, place).abs()
