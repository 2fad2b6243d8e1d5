"""Which ΔW of a module are one and the same, however they are written."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.linalg.factored import NOISE, Factors, distance, scaled
from lorakit.linalg.tiles import part, places, sides_of
from lorakit.methods.delta import Delta
from lorakit.methods.sampling import elements_of, places_of

_SIDE = 16
_NEAR = 1e-3
"""Equal ΔW have equal elements; where some differ by more there is no need to look at the rest."""


def unified(deltas: Sequence[Delta]) -> list[Delta]:
    """Let ΔW that are equal but for their sign and the rounding of fp32 be that of the first.

    A LoRA and its copy in other factors, (10 · up, down / 10), differ in their last bits, and
    these would decide an election where the two cancel. A sign goes into the strength.

    Args:
        deltas: of one module, all of one shape.

    Returns:
        The same deltas; those whose ΔW is equal share one object.

    Cost: 256 elements of each; a QR of both, or a pass over the matrices, for a pair that is equal.
    """
    rows, columns = places_of(deltas[0].shape, side=_SIDE)
    found: list[Delta] = []
    some: list[Tensor] = []
    for delta in deltas:
        own = elements_of(delta.change, rows, columns)
        pairs = ((d, _sign(own, other)) for d, other in zip(found, some, strict=True))
        twins = ((d, sign) for d, sign in pairs if sign and _equal(delta.change, d.change, sign))
        twin, sign = next(twins, (delta, 1.0))
        found.append(replace(delta, change=twin.change, strength=sign * delta.strength))
        some.append(own * sign)
    return found


def _sign(one: Tensor, other: Tensor) -> float:
    """Return the sign with which some elements are equal, 0 where they are not."""
    sign = -1.0 if float((one * other).sum()) < 0 else 1.0
    near = float((one - sign * other).abs().max()) <= _NEAR * float(one.abs().max())
    return sign if near else 0.0


def _equal(one: Factors | Tensor, other: Factors | Tensor, sign: float) -> bool:
    if one is other:
        return sign > 0
    if isinstance(one, Factors) and isinstance(other, Factors):
        return distance(_double(one), _double(scaled(other, sign))) <= NOISE
    off = whole = 0.0
    shape = int(one.shape[0]), int(one.shape[1])
    for place in places(shape, sides_of(shape)):
        tile = part(one, place).double()
        whole += float(tile.square().sum())
        off += float((tile - sign * part(other, place).double()).square().sum())
    return math.sqrt(off) <= NOISE * math.sqrt(whole)


def _double(factors: Factors) -> Factors:
    return Factors(up=factors.up.to(torch.float64), down=factors.down.to(torch.float64))
