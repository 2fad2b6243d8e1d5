"""Trimming over the whole model: one threshold for all layers of a LoRA."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lorakit.linalg.tiles import part, places, sides_of
from lorakit.methods.delta import Delta
from lorakit.methods.sampling import sample_of
from lorakit.methods.trimming import threshold

Modules = Sequence[Callable[[], Sequence[Delta]]]
"""Makes the ΔW of each module again."""


def model_cuts(modules: Modules, density: float) -> Mapping[str, float]:
    """Return owner -> the magnitude that the share `density` of all its elements reaches.

    Args:
        modules: make the ΔW of each module, as often as they are asked to.
        density: the share of the elements that is kept.

    Source: TIES, arXiv 2306.01708, whose code flattens the model into one vector.

    Cost: one pass of products, and a sample, a LoRA.
    """
    sizes: dict[str, int] = {}
    samples: dict[str, list[torch.Tensor]] = {}
    for make in modules:
        for delta in make():
            sizes[delta.owner] = sizes.get(delta.owner, 0) + delta.shape[0] * delta.shape[1]
            samples.setdefault(delta.owner, []).append(sample_of(delta.change, side=64).flatten())
    cuts = {}
    for owner, whole in sizes.items():
        count = max(1, int(density * whole))
        found = torch.cat([tile.double() for tile in samples[owner]])
        cuts[owner], _, _ = threshold(_magnitudes(modules, owner), count, whole=whole, sample=found)
    return cuts


def _magnitudes(
    modules: Modules, owner: str
) -> Callable[[], Iterator[tuple[tuple[slice, slice], torch.Tensor]]]:
    def tiles() -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        for make in modules:
            for delta in make():
                if delta.owner == owner:
                    for place in places(delta.shape, sides_of(delta.shape)):
                        yield place, part(delta.change, place).abs()

    return tiles
