"""Methods that need the angles between the ΔW alone: their Gram matrix, never a dense matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, gram
from lorakit.linalg.tiles import Change
from lorakit.linalg.tiles import dense as made
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.methods.method import Method

_STEPS, _STILL = 1000, 1e-14
_MERGEKIT_STEPS, _MERGEKIT_STILL = 10, 1e-5
_OPPOSITE = 1e-14
_PARALLEL = 1e-7
"""Sine of an angle that has no arc."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Angles:
    """The LoRAs as unit vectors.

    Args:
        cosines: [T, T] of sign(strength) · ΔW.
        norms: [T] of ΔW.
        weights: [T], the strengths' sizes, their sum 1.
        total: the sum of the strengths' sizes.
    """

    cosines: Tensor
    norms: Tensor
    weights: Tensor
    total: float

    @staticmethod
    def of(deltas: Sequence[Delta]) -> "_Angles":
        """Measure ΔW that are not zero."""
        products = gram_of(deltas)
        signs = torch.tensor([math.copysign(1.0, d.strength) for d in deltas], dtype=torch.float64)
        norms = products.diagonal().clamp(min=0).sqrt()
        sizes = torch.tensor([abs(d.strength) for d in deltas], dtype=torch.float64)
        lengths = norms * signs
        cosines = (products / lengths / lengths[:, None]).clamp(-1.0, 1.0)
        cosines.fill_diagonal_(1.0)
        whole = float(sizes.sum())
        return _Angles(cosines=cosines, norms=norms, weights=sizes / whole, total=whole)


def slerp(deltas: Sequence[Delta], method: Method) -> Change:
    """Turn from the first of two ΔW to the second along the arc between them.

    The direction is on the arc, at the share of the second's strength; the norm is the weighted
    mean of the norms; and the whole is multiplied by the sum of the strengths, so that at angle 0
    it is their sum. mergekit's flavor gives its `nuslerp`: the vectors themselves take the arc's
    coefficients, which dips or lifts the norm where norms or angles differ, and is not multiplied.

    Args:
        deltas: two, or one where only one LoRA changes the module.
        method: its flavor.

    Source: Shoemake 1985; mergekit 0.1.5.

    - parallel and opposite vectors have no arc: the weighted sum
    """
    if method.flavor == "lorakit":
        return karcher(deltas, method)
    live = _live(deltas)
    if len(live) < 2:
        return linear(deltas)
    angles = _Angles.of(live)
    cosine, share = float(angles.cosines[0, 1]), float(angles.weights[1])
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine <= _PARALLEL:
        return _combined(live, torch.tensor([1 - share, share], dtype=torch.float64))
    arc = [math.sin((1 - share) * angle) / sine, math.sin(share * angle) / sine]
    return _combined(live, torch.tensor(arc, dtype=torch.float64))


def karcher(deltas: Sequence[Delta], method: Method) -> Change:
    """Return the mean direction on the sphere at the weighted mean norm, for any number.

    The point whose squared distances along the sphere to all ΔW, weighted by the strengths' sizes,
    have the smallest sum. Found by following the mean of the arcs until it stands still. The whole
    is multiplied by the sum of the strengths, so that for parallel ΔW it is their sum. mergekit's
    flavor knows no strengths but their signs, and takes ten steps.

    Args:
        deltas: of one module.
        method: its flavor.

    Source: Karcher 1977; mergekit 0.1.5.

    - opposite vectors have no arc between them: the weighted sum
    """
    live = _live(deltas)
    if len(live) < 2:
        return linear(deltas)
    angles = _Angles.of(live)
    if float(angles.cosines.min()) < -1 + _OPPOSITE and method.flavor == "lorakit":
        return linear(deltas)
    if method.flavor == "mergekit":
        even = torch.full_like(angles.weights, 1 / len(live))
        shares = _mean_direction(angles.cosines, even, _MERGEKIT_STEPS, _MERGEKIT_STILL)
        # mergekit counts ΔW of zero in its mean norm.
        factor = float(angles.norms.sum()) / len(deltas)
    else:
        shares = _mean_direction(angles.cosines, angles.weights, _STEPS, _STILL)
        factor = angles.total * float(angles.weights @ angles.norms)
    if shares is None:
        return linear(deltas)
    return _combined(live, shares * factor / angles.norms)


def _mean_direction(cosines: Tensor, weights: Tensor, steps: int, still: float) -> Tensor | None:
    """Return the mean direction as coefficients of the unit vectors; None where there is none."""
    mean = _unit(weights, cosines)
    if mean is None:
        return None
    for _ in range(steps):
        toward = (cosines @ mean).clamp(-1.0, 1.0)
        angles = toward.acos()
        arcs = torch.where(angles > still, angles / angles.sin().clamp(min=1e-300), 1.0)
        tangent = weights * arcs - (weights * arcs * toward).sum() * mean
        length = math.sqrt(max(float(tangent @ cosines @ tangent), 0.0))
        if length < still:
            break
        moved = _unit(math.cos(length) * mean + math.sin(length) / length * tangent, cosines)
        if moved is None or torch.equal(moved, mean):
            break
        mean = moved
    return mean


def _unit(shares: Tensor, cosines: Tensor) -> Tensor | None:
    length = math.sqrt(max(float(shares @ cosines @ shares), 0.0))
    return shares / length if length > _PARALLEL else None


def model_stock(deltas: Sequence[Delta], method: Method) -> Change:
    """Multiply the sum by how much the ΔW agree: 1 where they are parallel, 0 where orthogonal.

    With N ΔW and their mean cosine c the factor is N c / (1 + (N − 1) c).

    Args:
        deltas: of one module.
        method: its flavor; mergekit's takes the plain mean in place of the sum.

    Source: Model Stock, arXiv 2403.19522.

    - a factor below 0, of ΔW that oppose each other, is taken as 0 (lorakit's flavor)
    """
    factor = stock_factor(deltas, clamped=method.flavor == "lorakit")
    if method.flavor == "mergekit":
        factor /= len(deltas)
        deltas = [replace(d, strength=math.copysign(1.0, d.strength)) for d in deltas]
    return linear([replace(delta, strength=delta.strength * factor) for delta in deltas])


def stock_factor(deltas: Sequence[Delta], *, clamped: bool = True) -> float:
    """Return model-stock's factor of the sum.

    Args:
        deltas: of one module.
        clamped: whether it stays between 0 and 1.
    """
    count, live = len(deltas), _live(deltas)
    if count < 2 or not live:
        return 1.0
    # A ΔW of zero has no angle: it counts as orthogonal.
    cosines = _Angles.of(live).cosines
    pairs = float(cosines.sum() - len(live)) / (count * (count - 1))
    whole = 1 + (count - 1) * pairs
    factor = count * pairs / whole if abs(whole) > 1e-6 else 0.0
    return min(max(factor, 0.0), 1.0) if clamped else factor


def gram_of(deltas: Sequence[Delta]) -> Tensor:
    """Return the inner products [T, T] of the ΔW, without their strengths, in fp64."""
    factors = [d.change for d in deltas if isinstance(d.change, Factors)]
    if len(factors) == len(deltas):
        return gram(factors)
    whole = [made(d.change).double().flatten() for d in deltas]
    return torch.stack([torch.stack([one @ other for other in whole]) for one in whole])


def _live(deltas: Sequence[Delta]) -> list[Delta]:
    """Leave out ΔW of zero, which have no direction."""
    squares = gram_of(deltas).diagonal()
    return [d for d, square in zip(deltas, squares.tolist(), strict=True) if square > 0]


def _combined(deltas: Sequence[Delta], shares: Tensor) -> Change:
    """Return Σ share · sign(strength) · ΔW."""
    return linear(
        [
            replace(delta, strength=math.copysign(1.0, delta.strength) * share)
            for delta, share in zip(deltas, shares.tolist(), strict=True)
        ]
    )
