"""Methods that treat each element by itself: sparsify each ΔW, then sum or vote."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Change, Place, Tiled, dense
from lorakit.methods.delta import Delta, alone
from lorakit.methods.dropping import dropping, mask_name
from lorakit.methods.method import Method
from lorakit.methods.sce import Selected, sce
from lorakit.methods.stacking import Grid, Thin, grid_of, stacked
from lorakit.methods.strengths import divisor
from lorakit.methods.trimming import trimming
from lorakit.methods.voting import Ballot, ballot_of

Combine = Callable[[Tensor], Tensor]
"""Returns what tiles [T, rows, columns], which it may overwrite, make together."""


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
        In the widest dtype of the inputs, fp32 at least.

    Source: TIES 2306.01708, DARE 2311.03099, DELLA 2406.11617, Breadcrumbs 2312.06795.

    - every method sees ΔW, never a factor
    - where one LoRA acts alone nothing is trimmed or dropped (lorakit's flavor)

    Cost: the products twice where a threshold is over the whole matrix, once otherwise.
    """
    grid = grid_of(deltas, whole_rows=method.entry.random or method.scope == "row")
    if method.name == "sce":
        selected, ballot = sce(deltas, method, grid)
        tile = partial(_selected_tile, selected, ballot)
    else:
        thins = _thins(deltas, method, module, cuts, grid)
        tile = partial(_tile, deltas, grid, thins, _combine(deltas, method, grid, thins))
    merged = Tiled(shape=grid.shape, sides=grid.sides, tile=tile)
    return merged if any(isinstance(d.change, Factors) for d in deltas) else dense(merged)


def _tile(
    deltas: Sequence[Delta], grid: Grid, thins: Sequence[Thin], combine: Combine, place: Place
) -> Tensor:
    return combine(_thinned(deltas, grid, thins, place))


def _thinned(deltas: Sequence[Delta], grid: Grid, thins: Sequence[Thin], place: Place) -> Tensor:
    stack = stacked([delta.change for delta in deltas], grid, place)
    for thin, tile in zip(thins, stack, strict=False):
        thin(tile, place)
    return stack


def _selected_tile(selected: Selected, ballot: Ballot, place: Place) -> Tensor:
    return ballot.combined(selected.stack(place))


def _thins(
    deltas: Sequence[Delta], method: Method, module: str, cuts: Mapping[str, float], grid: Grid
) -> list[Thin]:
    """Return what thins each LoRA's ΔW, or nothing where all of it is kept."""
    if method.density in (None, 1.0) or (method.flavor == "lorakit" and alone(deltas)):
        return []
    if not method.entry.random:
        return [
            trimming(d.change, method, grid, cuts.get(d.owner) if method.scope == "model" else None)
            for d in deltas
        ]
    names = [mask_name(method.name, method.seed or 0, d.owner, module) for d in deltas]
    return [dropping(d.change, method, grid, n) for d, n in zip(deltas, names, strict=True)]


def _combine(deltas: Sequence[Delta], method: Method, grid: Grid, thins: Sequence[Thin]) -> Combine:
    strengths = [delta.strength for delta in deltas]
    if method.entry.votes:
        return ballot_of(method, strengths, partial(_majority, deltas, grid, thins)).combined
    if method.normalize:
        whole = divisor(method, strengths)
        strengths = [strength / whole for strength in strengths]
    return partial(_summed, strengths)


def _summed(strengths: Sequence[float], kept: Tensor) -> Tensor:
    total = kept[0].mul_(strengths[0])
    for tile, strength in zip(kept[1:], strengths[1:], strict=True):
        total.add_(tile, alpha=strength)
    return total


def _majority(deltas: Sequence[Delta], grid: Grid, thins: Sequence[Thin], ballot: Ballot) -> float:
    """Return the sign that most elements elect, 0 where as many elect each."""
    stacks = (_thinned(deltas, grid, thins, place) for place in grid.places())
    total = sum(int(ballot.elected(stack).sum(dtype=torch.float64)) for stack in stacks)
    return float((total > 0) - (total < 0))
