"""Which dim does a LoRA need: the energy that it keeps at each rank."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorakit.operations.inspection import Curve, Group, Spectrum

SHARES = {"90": 0.90, "95": 0.95, "99": 0.99}
TOTAL = "all"
_EVERY = 64
_STEPS = 8
_SLACK = 1e-12


class Measured(Protocol):
    """What is known of a layer."""

    @property
    def sigma(self) -> Tensor:
        """The singular values of ΔW in fp64, falling."""

    @property
    def vector(self) -> bool:
        """Whether it is a bias or a norm, which has no rank."""


def spectrum_of(
    layers: Mapping[str, Measured], block_of: Callable[[str], str], blocks: Sequence[Group]
) -> Spectrum:
    """Return the energy that the layers keep when each is cut to a rank, by block and in total.

    Args:
        layers: module -> what is known of it.
        block_of: module -> block id.
        blocks: gives the order.

    Source: Eckart-Young: rank k keeps the k largest σ of each layer, which is what `resize --rank`
    does.
    """
    inside = {
        block.id: [layer for module, layer in layers.items() if block_of(module) == block.id]
        for block in blocks
    }
    most = max((len(layer.sigma) for layer in layers.values() if not layer.vector), default=0)
    ranks = grid(most)
    return Spectrum(
        ranks=ranks,
        total=_curve(TOTAL, list(layers.values()), ranks),
        blocks=tuple(_curve(block, found, ranks) for block, found in inside.items() if found),
    )


def grid(most: int) -> tuple[int, ...]:
    """Return the ranks of a curve: all up to 64, then eight an octave, and the largest."""
    ranks = list(range(1, min(most, _EVERY) + 1))
    step = 1
    while (rank := round(_EVERY * 2 ** (step / _STEPS))) < most:
        ranks.append(rank)
        step += 1
    return tuple(dict.fromkeys((*ranks, most))) if most else ()


def _curve(name: str, layers: Sequence[Measured], ranks: tuple[int, ...]) -> Curve:
    ranked = [layer.sigma for layer in layers if not layer.vector]
    rank = max((len(sigma) for sigma in ranked), default=0)
    energies = torch.zeros(rank, dtype=torch.float64)
    for sigma in ranked:
        energies[: len(sigma)] += sigma**2
    fixed = sum(float((layer.sigma**2).sum()) for layer in layers if layer.vector)
    sums = energies.cumsum(0) + fixed
    whole = float(sums[-1]) if rank else fixed
    if not whole:
        return Curve(id=name, rank=rank, needed=dict.fromkeys(SHARES, 0), kept=(1.0,) * len(ranks))
    needed = {
        share: min(int((sums < goal * whole * (1 - _SLACK)).sum()) + 1, rank)
        for share, goal in SHARES.items()
    }
    kept = [float(sums[min(at, rank) - 1]) / whole if rank else 1.0 for at in ranks]
    return Curve(id=name, rank=rank, needed=needed, kept=tuple(kept))
