"""Random masks that depend on a name and an element's position alone: DARE and DELLA."""

import torch
from torch import Tensor

from lorakit.linalg.masks import lanes
from lorakit.linalg.tiles import Place

LEVELS = 2**16
"""A chance is a number of 65536ths, so that the rescaling is its exact inverse."""


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
    if level == LEVELS:
        return torch.ones(tile.shape, dtype=torch.bool), 1.0
    drawn = _drawn(tile, place, name) < level
    return drawn, LEVELS / level


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

    Source: DELLA, arXiv 2406.11617.

    - a row of one element has the chance density; mergekit 0.1.5 divides by zero there
    """
    rows, columns = tile.shape
    order = tile.abs().sort(dim=1, stable=True).indices
    if columns > 1:
        chances = torch.linspace(density - epsilon, density + epsilon, columns, dtype=torch.float64)
    else:
        chances = torch.full((1,), density, dtype=torch.float64)
    levels = (chances * LEVELS).round_().clamp_(1, LEVELS).expand(rows, columns)
    thresholds = torch.empty(rows, columns, dtype=torch.float64).scatter_(1, order, levels)
    return _drawn(tile, place, name) < thresholds, LEVELS / thresholds


def _drawn(tile: Tensor, place: Place, name: str) -> Tensor:
    rows, columns = tile.shape
    found = lanes(name, place[0].start * columns, rows * columns)
    return torch.from_numpy(found.astype("int32")).reshape(rows, columns)
