"""sce: keep where the LoRAs differ, weigh each by its energy, drop the signs of the minority."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lorakit.linalg.tiles import Place, size
from lorakit.methods.delta import Delta, alone
from lorakit.methods.method import Method
from lorakit.methods.sampling import sample_of
from lorakit.methods.stacking import Grid, Tiles, stacked
from lorakit.methods.trimming import EVERYTHING, Cut, largest
from lorakit.methods.voting import SLACK, TINY, Ballot

_FAINT = 1e-6
"""Below it mergekit takes equal weights, and divides by it in place of a smaller weight."""
_ROUNDINGS = 4
"""The mean of equal values is off by less than so many units in the last place."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selected:
    """What sce acts on: strength · ΔW, where their variance over the LoRAs is large.

    Args:
        deltas: of one module.
        strengths: what each ΔW is multiplied by.
        grid: the tiles in which they are made.
        cut: the variances that are large.
    """

    deltas: Sequence[Delta]
    strengths: Sequence[float]
    grid: Grid
    cut: Cut = EVERYTHING

    def stack(self, place: Place) -> Tensor:
        """Make what a tile [T, rows, columns] holds, anew each time."""
        stack = stacked([delta.change for delta in self.deltas], self.grid, place)
        for tile, strength in zip(stack, self.strengths, strict=True):
            tile.mul_(strength)
        # Where the LoRAs do not differ at all there is nothing to choose.
        if self.cut.value > 0.0:
            stack.mul_(self.cut.kept(variance(stack), place).sign_())
        return stack


def variance(values: Tensor) -> Tensor:
    """Return the variance over T of values [T, ...], the mean of the squares about the mean.

    It is 0 where it is the rounding of the mean of equal values.
    """
    mean, off, total = (torch.zeros_like(values[0]) for _ in range(3))
    for tile in values:
        mean.add_(tile)
    mean.div_(len(values))
    for tile in values:
        torch.sub(tile, mean, out=off)
        total.addcmul_(off, off)
    total.div_(len(values))
    rounding = mean.mul_(_ROUNDINGS * torch.finfo(mean.dtype).eps).square_()
    return total.mul_(total > rounding)


def sce(deltas: Sequence[Delta], method: Method, grid: Grid) -> tuple[Selected, Ballot]:
    """Return what is selected of each LoRA, and the ballot that combines it.

    With x = strength · ΔW: elements are selected by their variance over the LoRAs, each LoRA is
    weighed by the mean square of what is selected of it, and the mean is over those of the
    majority's sign. A mean, so that strengths count by their ratio to each other and the whole is
    linear in them; `normalize` divides it by the mean of the strengths' sizes.

    Args:
        deltas: of one module.
        method: with every parameter set.
        grid: the tiles in which they are made.

    Source: SCE, arXiv 2408.07990; mergekit 0.1.5.

    - a sum of exactly zero elects no sign; mergekit's flavor elects +
    - the share is of all elements; in mergekit's flavor of those whose variance is not zero
    - mergekit's flavor takes equal weights where the mean squares are below 1e-6, as those of most
      LoRAs are

    Cost: with a density below 1 the products three times, else once.
    """
    strengths = [delta.strength for delta in deltas]
    if method.normalize:
        mean = sum(map(abs, strengths)) / len(strengths)
        strengths = [strength / mean for strength in strengths]
    given = Selected(deltas=deltas, strengths=strengths, grid=grid)
    lorakit = method.flavor == "lorakit"
    if method.density not in (None, 1.0) and not (lorakit and alone(deltas)):
        cut = _selection(given, method.density or 1.0, method.flavor)
        given = Selected(deltas=deltas, strengths=strengths, grid=grid, cut=cut)
    energies = _energies(given)
    whole, elements = sum(energies), grid.shape[0] * grid.shape[1]
    faint = whole <= 0.0 if lorakit else whole < _FAINT * elements
    weights = [1 / len(deltas) if faint else energy / whole for energy in energies]
    ballot = Ballot(
        voices=[1.0] * len(deltas),
        strengths=weights,
        shares=weights,
        slack=SLACK if lorakit else 0.0,
        tie=0.0 if lorakit else 1.0,
        least=TINY if lorakit else _FAINT,
    )
    return given, ballot


def _energies(given: Selected) -> list[float]:
    if given.cut.value == 0.0:
        return [
            (strength * size(delta.change)) ** 2
            for delta, strength in zip(given.deltas, given.strengths, strict=True)
        ]
    energies = [0.0] * len(given.deltas)
    for place in given.grid.places():
        for index, tile in enumerate(given.stack(place).flatten(1)):
            energies[index] += float(torch.dot(tile, tile))
    return energies


def _selection(given: Selected, density: float, flavor: str) -> Cut:
    shape = given.grid.shape
    tiles, whole = _variances(given), shape[0] * shape[1]
    if flavor == "mergekit":
        whole = sum(int(np.count_nonzero(tile.numpy())) for _, tile in tiles())
    count = int(density * whole)
    if flavor == "lorakit":
        count = max(1, count)
    return largest(tiles, (count,), shape=shape, sample=partial(_sample, given))[0]


def _sample(given: Selected) -> Tensor:
    drawn = [
        sample_of(delta.change, signed=True).double() * strength
        for delta, strength in zip(given.deltas, given.strengths, strict=True)
    ]
    return variance(torch.stack(drawn))


def _variances(given: Selected) -> Tiles:
    def made() -> Iterator[tuple[Place, Tensor]]:
        for place in given.grid.places():
            yield place, variance(given.stack(place))

    return made
