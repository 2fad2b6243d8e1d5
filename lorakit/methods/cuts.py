"""Trimming over the whole model: one threshold for all layers of a LoRA."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lorakit.linalg.tiles import Place
from lorakit.methods.delta import Delta
from lorakit.methods.sampling import sample_of
from lorakit.methods.selection import thresholds
from lorakit.methods.stacking import Tiles, grid_of, magnitudes

Modules = Sequence[Callable[[], Sequence[Delta]]]
"""Makes the ΔW of each module again."""
_SHARE = 2**11
"""One in so many elements is looked at first."""
_LEAST = 2**10


def model_cuts(modules: Modules, density: float) -> Mapping[str, float]:
    """Return owner -> the magnitude that the share `density` of all its elements reaches.

    Args:
        modules: make the ΔW of each module, as often as they are asked to.
        density: the share of the elements that is kept.

    Source: TIES, arXiv 2306.01708, whose code flattens the model into one vector.

    - k elements are kept, where that code keeps k + 1
    - each ΔW is made in the dtype that it has alone: as in a merge of ΔW of one dtype

    Cost: one pass of products, and a sample, a LoRA.
    """
    sizes: dict[str, int] = {}
    samples: dict[str, list[Tensor]] = {}
    kinds: dict[str, torch.dtype] = {}
    for make in modules:
        for delta in make():
            before = sizes.get(delta.owner, 0)
            sizes[delta.owner] = before + delta.shape[0] * delta.shape[1]
            # A module has the share of the sample that it has of the elements.
            wanted = sizes[delta.owner] // _SHARE - before // _SHARE
            found = sample_of(delta.change, count=max(_LEAST, 2 * wanted)).flatten()
            wanted = min(wanted, len(found))
            chosen = found[torch.arange(wanted) * len(found) // max(1, wanted), None]
            samples.setdefault(delta.owner, []).append(chosen)
            kind = grid_of([delta]).dtype
            kinds[delta.owner] = torch.promote_types(kinds.get(delta.owner, kind), kind)
    return {
        owner: thresholds(
            _magnitudes(modules, owner, kinds[owner]),
            (max(1, int(density * whole)),),
            whole=whole,
            sample=partial(torch.cat, samples[owner]),
        )[0].value
        for owner, whole in sizes.items()
    }


def _magnitudes(modules: Modules, owner: str, kind: torch.dtype) -> Tiles:
    def made() -> Iterator[tuple[Place, Tensor]]:
        for make in modules:
            for delta in make():
                if delta.owner == owner:
                    for place, tile in magnitudes(delta.change, grid_of([delta]))():
                        yield place, tile.to(kind)

    return made
