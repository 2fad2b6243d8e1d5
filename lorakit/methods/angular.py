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
_PARALLEL = 1e-7
"""Sine of an angle that has no arc."""
_NO_SUM = 1e-6
"""mergekit takes even shares where the strengths have a smaller sum."""
_OPPOSITE = 1e-5
"""Cosines this close to -1 are opposite: what is left of two ΔW there is the rounding of bf16."""
_FADED = 1e-2
"""A weighted sum of unit vectors below this length has cancelled: its direction is rounding."""


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
    def of(deltas: Sequence[Delta], products: Tensor) -> "_Angles":
        """Measure ΔW that are not zero, from their inner products."""
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
    coefficients, which dips or lifts the norm where norms or angles differ, and is not multiplied;
    a strength says only what share it has of the sum of both, signs included.

    Args:
        deltas: two, or one where only one LoRA changes the module.
        method: its flavor.

    Source: Shoemake 1985; mergekit 0.1.5.

    - parallel and opposite vectors have no arc: the weighted sum
    """
    if method.flavor == "lorakit":
        return karcher(deltas, method)
    if len(deltas) < 2:
        return linear(deltas)
    strengths = [delta.strength for delta in deltas]
    share = strengths[1] / sum(strengths) if abs(sum(strengths)) >= _NO_SUM else 0.5
    products = gram_of(deltas)
    norms = products.diagonal().clamp(min=0).sqrt()
    cosine = float(products[0, 1]) / max(float(norms.prod()), 1e-300)
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    sine = math.sin(angle)
    arc = [1 - share, share]
    if sine > _PARALLEL:
        arc = [math.sin(part * angle) / sine for part in arc]
    return linear([replace(d, strength=part) for d, part in zip(deltas, arc, strict=True)])


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

    - vectors that cancel, and one opposite to the mean of all, have no arc: the weighted sum
    """
    live, products = _live(deltas)
    mergekit = method.flavor == "mergekit"
    if len(live) < (1 if mergekit else 2):
        return linear(deltas)
    angles = _Angles.of(live, products)
    if mergekit:
        shares = _mean_of_mergekit(angles.cosines)
        # mergekit counts ΔW of zero in its mean norm.
        factor = float(angles.norms.sum()) / len(deltas)
        return _combined(live, shares * factor / angles.norms)
    mean = _mean_direction(angles.cosines, angles.weights)
    if mean is None:
        return linear(deltas)
    factor = angles.total * float(angles.weights @ angles.norms)
    return _combined(live, mean * factor / angles.norms)


def _mean_direction(cosines: Tensor, weights: Tensor) -> Tensor | None:
    """Return the mean direction as coefficients of the unit vectors; None where there is none."""
    mean, length = _unit(weights, cosines)
    for _ in range(_STEPS):
        if length < _FADED or float((cosines @ mean).min()) < _OPPOSITE - 1:
            return None
        moved, turned = _moved(mean, cosines, weights, _STILL)
        if turned < _STILL or torch.equal(moved, mean):
            break
        mean = moved
    return mean


def _mean_of_mergekit(cosines: Tensor) -> Tensor:
    even = torch.full_like(cosines[0], 1 / len(cosines))
    mean, length = _unit(even, cosines)
    if length < _MERGEKIT_STILL:
        mean = torch.eye(len(cosines), dtype=cosines.dtype)[0]
    for _ in range(_MERGEKIT_STEPS):
        moved, turned = _moved(mean, cosines, even, _MERGEKIT_STILL)
        if turned < _MERGEKIT_STILL:
            break
        mean = moved
    return mean


def _moved(mean: Tensor, cosines: Tensor, weights: Tensor, still: float) -> tuple[Tensor, float]:
    """Follow the weighted mean of the arcs from a point; tell how far that is.

    Args:
        mean: [T], a unit vector as coefficients of the unit vectors.
        cosines: [T, T] of these.
        weights: [T], their sum 1.
        still: an angle that is none.
    """
    toward = (cosines @ mean).clamp(-1.0, 1.0)
    angles = toward.acos()
    sines = angles.sin()
    # To the opposite point leads no arc more than another.
    has_arc = (angles > still) & (sines > _PARALLEL)
    arcs = weights * torch.where(has_arc, angles / sines.clamp(min=_PARALLEL), 1.0)
    tangent = arcs - (arcs @ toward) * mean
    length = math.sqrt(max(float(tangent @ cosines @ tangent), 0.0))
    if length < still:
        return mean, length
    point = math.cos(length) * mean + math.sin(length) / length * tangent
    return _unit(point, cosines)[0], length


def _unit(shares: Tensor, cosines: Tensor) -> tuple[Tensor, float]:
    """Return a vector at length 1, and the length that it had."""
    length = math.sqrt(max(float(shares @ cosines @ shares), 0.0))
    return shares / max(length, 1e-300), length


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
    count = len(deltas)
    live, products = _live(deltas)
    if count < 2 or not live:
        return 1.0
    # A ΔW of zero has no angle: it counts as orthogonal.
    cosines = _Angles.of(live, products).cosines
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


def _live(deltas: Sequence[Delta]) -> tuple[list[Delta], Tensor]:
    """Leave out ΔW of zero, which have no direction; return the others' inner products too."""
    products = gram_of(deltas)
    places = [place for place, square in enumerate(products.diagonal().tolist()) if square > 0]
    return [deltas[place] for place in places], products[places][:, places]


def _combined(deltas: Sequence[Delta], shares: Tensor) -> Change:
    """Return Σ share · sign(strength) · ΔW."""
    return linear(
        [
            replace(delta, strength=math.copysign(1.0, delta.strength) * share)
            for delta, share in zip(deltas, shares.tolist(), strict=True)
        ]
    )
