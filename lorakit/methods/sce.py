"""sce: keep where the LoRAs differ, weigh each by its energy, drop the signs of the minority."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorakit.linalg.tiles import Place, part, places
from lorakit.methods.delta import Delta, alone
from lorakit.methods.method import Method
from lorakit.methods.trimming import EVERYTHING, Cut, largest

_FAINT = 1e-6
"""Below this sum of energies or weights mergekit takes equal ones."""
_SAMPLED_TILES = 8


def sce(
    deltas: Sequence[Delta], method: Method, sides: tuple[int, int]
) -> Callable[[Place], Tensor]:
    """Return what makes the tiles of the merged matrix.

    With x = strength · ΔW: elements are selected by their variance over the LoRAs, each LoRA is
    weighed by the mean square of what is selected of it, and the mean is over those of the
    majority's sign. A mean, so that strengths count by their ratio to each other and the whole is
    linear in them.

    Args:
        deltas: of one module.
        method: with every parameter set.
        sides: of a tile.

    Source: SCE, arXiv 2408.07990; mergekit 0.1.5.

    - a sum of exactly zero elects no sign; mergekit's flavor elects +
    """
    if method.normalize:
        whole = sum(abs(delta.strength) for delta in deltas) / len(deltas)
        deltas = [replace(delta, strength=delta.strength / whole) for delta in deltas]
    cut = EVERYTHING
    if method.density not in (None, 1.0) and not (method.flavor == "lorakit" and alone(deltas)):
        cut = _selection(deltas, method.density or 1.0, sides)
    energies = torch.zeros(len(deltas), dtype=torch.float64)
    for place in places(deltas[0].shape, sides):
        tiles = _selected(deltas, cut, place)
        energies += torch.stack([tile.double().square().sum() for tile in tiles])
    whole, elements = float(energies.sum()), deltas[0].shape[0] * deltas[0].shape[1]
    faint = whole <= (_FAINT * elements if method.flavor == "mergekit" else 0.0)
    weights = [1 / len(deltas)] * len(deltas) if faint else (energies / whole).tolist()
    return partial(_tile, deltas, cut, weights, method.flavor)


def _tile(
    deltas: Sequence[Delta], cut: Cut, weights: Sequence[float], flavor: str, place: Place
) -> Tensor:
    tiles = _selected(deltas, cut, place)
    sign = torch.stack(tiles).sum(dim=0).sign_()
    if flavor == "mergekit":
        sign[sign == 0] = 1.0
    total, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for tile, share in zip(tiles, weights, strict=True):
        agrees = (tile * sign > 0).to(sign.dtype)
        total.addcmul_(tile, agrees, value=share)
        weight.add_(agrees, alpha=share)
    if flavor == "mergekit":
        return total.div_(weight.clamp_(min=_FAINT))
    return total.div_(torch.where(weight > 0, weight, torch.ones_like(weight)))


def _selected(deltas: Sequence[Delta], cut: Cut, place: Place) -> list[Tensor]:
    tiles = [part(delta.change, place) * delta.strength for delta in deltas]
    if cut is EVERYTHING:
        return tiles
    keeps = cut.keeps(_spread(tiles), place, deltas[0].shape[1])
    return [tile * keeps for tile in tiles]


def _spread(tiles: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tiles)).var(dim=0, unbiased=False)


def _selection(deltas: Sequence[Delta], density: float, sides: tuple[int, int]) -> Cut:
    def variances() -> Iterator[tuple[Place, Tensor]]:
        for place in places(deltas[0].shape, sides):
            yield place, _spread([part(d.change, place) * d.strength for d in deltas])

    found = list(places(deltas[0].shape, sides))
    some = found[:: max(1, len(found) // _SAMPLED_TILES)]
    sample = [_spread([part(d.change, at) * d.strength for d in deltas]).flatten() for at in some]
    live = sum(int(torch.count_nonzero(tile)) for _, tile in variances())
    count = max(1, int(live * density))
    return largest(variances, count, shape=deltas[0].shape, sample=torch.cat(sample)[::7])
