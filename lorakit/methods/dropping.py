"""Random masks that depend on a name and an element's position alone: DARE and DELLA."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.masks import lanes
from lorakit.linalg.tiles import Place
from lorakit.methods.method import Method
from lorakit.methods.stacking import Grid, Thin, stacked

LEVELS = 2**16
"""A chance is a number of 65536ths, so that the rescaling is its exact inverse."""
_FAINT = 1e-7
"""mergekit leaves a matrix of a smaller sum of magnitudes as it is."""

Draw = Callable[[Tensor, Place], tuple[Tensor, Tensor | float]]
"""Returns which elements of whole rows are kept, and what makes up for those that are not."""


def mask_name(method: str, seed: int, owner: str, module: str) -> str:
    """Return the name of the stream of one LoRA's mask of one module."""
    return "\n".join(("lorakit.mask.v1", method, str(seed), owner, module))


def dropped(tile: Tensor, place: Place, *, name: str, density: float) -> tuple[Tensor, float]:
    """Return which elements a fair draw keeps, and what makes up for those that it drops.

    Args:
        tile: whole rows of the matrix.
        place: where they lie.
        name: of the stream.
        density: the chance of each element.

    Returns:
        A mask of the tile's shape, and the factor of what is kept: 1 / density.

    Source: DARE, arXiv 2311.03099.
    """
    level = min(max(round(density * LEVELS), 1), LEVELS)
    return torch.from_numpy(_drawn(tile, place, name) < level), LEVELS / level


def dropped_by_rank(
    tile: Tensor, place: Place, *, name: str, density: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return which elements a draw keeps that favours the large ones of a row, and its inverse.

    The chance rises with the rank of the magnitude in its row from density − epsilon to density +
    epsilon; equal ones rank in order.

    Args:
        tile: whole rows of the matrix.
        place: where they lie.
        name: of the stream.
        density: the mean chance.
        epsilon: how far a chance is from it at most.

    Returns:
        A mask of the tile's shape, and the factor of each element: the inverse of its chance.

    Source: DELLA, arXiv 2406.11617, and its code; mergekit 0.1.5.

    - equal magnitudes rank in order, in both by chance
    - a row of one element has the chance density; mergekit divides by zero there
    """
    columns = tile.shape[1]
    rank = torch.arange(columns, dtype=torch.float64) / max(1, columns - 1)
    chances = density - epsilon + 2 * epsilon * rank if columns > 1 else rank + density
    levels = (chances * LEVELS).round_().clamp_(1, LEVELS)
    order = _ranked(tile.abs())
    # The last lane that is kept: a lane has 16 bits, the number of levels 17.
    lasts = _placed((levels - 1).to(torch.int32).to(torch.int16), order).numpy().view(np.uint16)
    return (
        torch.from_numpy(_drawn(tile, place, name) <= lasts),
        _placed((LEVELS / levels).to(tile.dtype), order),
    )


def _placed(values: Tensor, order: Tensor) -> Tensor:
    """Return a matrix whose row i holds values[j] at column order[i, j]."""
    return torch.empty(order.shape, dtype=values.dtype).scatter_(1, order, values.expand_as(order))


def _ranked(magnitude: Tensor) -> Tensor:
    """Return the columns of each row by rising magnitude, equal ones in order."""
    if magnitude.dtype != torch.float32:
        return magnitude.sort(dim=1, stable=True).indices
    # Magnitudes are ordered as their bits are. With the column below them one number tells all:
    # its sort needs no second array, and is many times as fast as a stable one.
    keys = magnitude.numpy().view(np.int32).astype(np.int64) << 32
    keys |= np.arange(magnitude.shape[1])
    keys.sort(axis=1)
    keys &= 2**32 - 1
    return torch.from_numpy(keys)


def _drawn(tile: Tensor, place: Place, name: str) -> np.ndarray:
    rows, columns = tile.shape
    return lanes(name, place[0].start * columns, rows * columns).reshape(rows, columns)


def dropping(change: Factors | Tensor, method: Method, grid: Grid, name: str) -> Thin:
    """Return what leaves of a matrix the elements that a draw keeps, and makes up for the others.

    Args:
        change: ΔW.
        method: with every parameter set.
        grid: the tiles in which ΔW is made, of whole rows.
        name: of the stream.
    """
    density, epsilon = method.density or 1.0, method.epsilon
    draw: Draw = partial(dropped, name=name, density=density)
    if epsilon is not None:
        draw = partial(dropped_by_rank, name=name, density=density, epsilon=epsilon)
    factor = _norm_factor(change, grid, draw) if method.flavor == "mergekit" else None
    return partial(_thin, draw, factor)


def _thin(draw: Draw, factor: float | None, tile: Tensor, place: Place) -> None:
    keeps, inverse = draw(tile, place)
    tile.mul_(inverse if factor is None else factor)
    _masked(tile, keeps)


def _masked(tile: Tensor, keeps: Tensor) -> Tensor:
    # Several times as fast as torch's product of numbers and truth values.
    values = tile.numpy()
    # What is infinite is refused where it would be written.
    with np.errstate(invalid="ignore"):
        np.multiply(values, keeps.numpy(), out=values)
    return tile


def _norm_factor(change: Factors | Tensor, grid: Grid, draw: Draw) -> float:
    """Return what gives the kept elements the sum of magnitudes of all, as mergekit rescales."""
    before = after = 0.0
    for place in grid.places():
        tile = stacked([change], grid, place)[0]
        keeps = draw(tile, place)[0]
        before += float(tile.abs_().sum(dtype=torch.float64))
        after += float(_masked(tile, keeps).sum(dtype=torch.float64))
    return before / after if min(before, after) >= _FAINT else 1.0
