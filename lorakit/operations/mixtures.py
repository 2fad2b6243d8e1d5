"""Whether one change is made of the others: a weighted sum, a cut by blocks, a lower rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from lorakit.operations.comparison import Compared, Comparison, Cut, Mixture, Part

MERGED, MOSTLY = 0.05, 0.3
"""Below this residual one is a weighted sum of the others; below the second it mostly is."""
TERM = 0.005
"""Below this a share is none."""
ROUNDED = 1.5
"""So many times the rounding of what is stored explains a residual."""
EVEN = 0.02
"""Strengths of blocks that differ by less are one strength."""
INSIDE = 0.98
"""Above this overlap the directions of one lie among the other's."""
BEST = 0.99
"""A lower rank that holds this part of the most that it can is a cut."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fit:
    """Weights of the others, and the norm of what they leave."""

    shares: Array
    left: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grams:
    """Inner products of all that may be a part, in total and by block; models weigh 1 together.

    Args:
        names: of changes the base comes first.
        total: [T, T].
        blocks: likewise.
        affine: whether weights sum to 1.
    """

    names: tuple[str, ...]
    total: Array
    blocks: Mapping[str, Array]
    affine: bool

    @classmethod
    def of(cls, found: Comparison) -> "_Grams":
        """Take them from a comparison; the base is zero among its changes."""
        base = found.base is not None

        def gram(row: Compared) -> Array:
            products: Array = np.array(row.gram, dtype=np.float64)
            return np.pad(products, ((1, 0), (1, 0))) if base else products

        return cls(
            names=found.names if found.base is None else (found.base, *found.names),
            total=gram(found.total),
            blocks={row.block: gram(row) for row in found.blocks},
            affine=base,
        )

    def fits(self, place: int, rest: Sequence[int]) -> dict[str, _Fit]:
        """Fit one by others in each block apart."""
        return {b: _fit(gram, place, rest, affine=self.affine) for b, gram in self.blocks.items()}

    def size(self, gram: Array, place: int, rest: Sequence[int]) -> float:
        """Return what a residual is relative to: the norm, of models the distance of the others."""
        if not self.affine:
            return _root(gram[place, place])
        return _root(float(np.mean([_apart(gram, place, at) for at in rest])))


def mixture_of(found: Comparison, *, noise: Sequence[float] = ()) -> Mixture | None:
    """Return which one is a weighted sum of two others or more, None where none is.

    Of LoRAs the weights are strengths, Σ sᵢ · ΔWᵢ; of models they are shares that sum to 1,
    Σ wᵢ · Wᵢ, the first model included. They may differ by block, as in a merge by block weights.
    Least squares on the inner products, which are exact.

    - Of A, B and their merge each is a sum of the others. The merge of LoRAs is the one that holds
      the directions of all others; else the one whose shares are above 0; else the last one.

    Args:
        found: LoRAs, or changes from the first model.
        noise: of models, the squared rounding error that each is expected to hold, the first one
            included: a residual of that size is none.
    """
    grams = _Grams.of(found)
    count = len(grams.names)
    if count < 3:
        return None
    tried = {place: _solved(grams, place, noise) for place in (count - 1, *range(count - 1))}
    there = {place: one for place, one in tried.items() if one is not None}
    holding = [one for place, one in there.items() if _holds(found.total, place)]
    natural = [one for one in there.values() if all(share > -TERM for share in _all_shares(one))]
    return next(iter((*holding, *natural, *there.values())), None)


def _holds(total: Compared, place: int) -> bool:
    """Tell whether one holds the directions of all others, and no other one does."""
    shared = np.array(total.overlap, dtype=np.float64)
    if not shared.size:
        return False
    others = np.delete(np.arange(len(shared)), place)
    inside = bool((shared[place, others] >= INSIDE).all())
    return inside and bool((shared[np.ix_(others, others)].min(axis=1) < INSIDE).all())


def _all_shares(found: Mixture) -> list[float]:
    if found.even:
        return list(found.shares.values())
    return [share for part in found.blocks.values() for share in part.shares.values()]


def _solved(grams: _Grams, place: int, noise: Sequence[float]) -> Mixture | None:
    rest = [at for at in range(len(grams.names)) if at != place]
    size = grams.size(grams.total, place, rest)
    if not size:
        return None
    whole = _fit(grams.total, place, rest, affine=grams.affine)
    parts = grams.fits(place, rest)
    floor = ROUNDED * _root(noise[place]) / size if noise else 0.0
    even, apart = whole.left / size, _together(parts) / size
    uneven = even > max(MERGED, floor) and apart <= max(MERGED, floor)
    residual = apart if uneven else even
    alone = _alone(grams, place, rest) / size
    shares = {grams.names[at]: float(s) for at, s in zip(rest, whole.shares, strict=True)}
    terms = {name: share for name, share in shares.items() if abs(share) > TERM}
    if residual > max(MOSTLY, floor) or residual > alone / 2 or alone < TERM or len(terms) < 2:
        return None
    return Mixture(
        name=grams.names[place],
        shares=terms,
        residual=residual,
        even=not uneven,
        rounding=floor / ROUNDED,
        blocks={
            block: Part(
                shares={grams.names[at]: float(s) for at, s in zip(rest, fit.shares, strict=True)},
                residual=_relative(fit.left, grams.size(grams.blocks[block], place, rest)),
            )
            for block, fit in parts.items()
        },
    )


def _fit(gram: Array, place: int, rest: Sequence[int], *, affine: bool) -> _Fit:
    """Return the least-squares sum of the others; of models with weights that sum to 1.

    Source: Wₜ − Σ wᵢ Wᵢ with Σ wᵢ = 1 is (Wₜ − Wₖ) − Σ wᵢ (Wᵢ − Wₖ) for any k of the others.
    """
    if affine:
        anchor, others = rest[0], rest[1:]
        moved = gram - gram[anchor] - gram[anchor][:, None] + gram[anchor, anchor]
        found = _fit(moved, place, others, affine=False)
        return _Fit(shares=np.array([1.0 - found.shares.sum(), *found.shares]), left=found.left)
    inside = gram[np.ix_(rest, rest)]
    products = gram[rest, place]
    shares: Array = np.linalg.lstsq(inside, products, rcond=1e-10)[0].astype(np.float64)
    left = float(gram[place, place] - 2 * shares @ products + shares @ inside @ shares)
    return _Fit(shares=shares, left=_root(left))


def _alone(grams: _Grams, place: int, rest: Sequence[int]) -> float:
    """Return the norm of what the best single one leaves: at any strength, of models as it is."""
    if grams.affine:
        return _root(min(_apart(grams.total, place, at) for at in rest))
    return min(_together(grams.fits(place, [at])) for at in rest)


def _together(parts: Mapping[str, _Fit]) -> float:
    return float(np.linalg.norm([fit.left for fit in parts.values()]))


def _apart(gram: Array, one: int, other: int) -> float:
    return float(gram[one, one] + gram[other, other] - 2 * gram[one, other])


def _root(square: float) -> float:
    return float(np.sqrt(max(float(square), 0.0)))


def _relative(left: float, size: float) -> float:
    return left / size if size else 0.0


def cut_of(found: Comparison) -> Cut | None:
    """Return which LoRA is what was left of another one, None where none is.

    By blocks: in each it is the other at some strength, or nothing. By rank: their inner product is
    that of a projection, ⟨A, s · A_r⟩ = s · ‖A_r‖², so that ‖B‖² / ⟨A, B⟩ is the same s everywhere,
    and it holds all that its rank can hold of A. What is one LoRA at another strength is no cut.
    The one that has lost most is taken.
    """
    if found.kind != "loras":
        return None
    pairs = permutations(range(len(found.names)), 2)
    cuts = [cut for pair in pairs if (cut := _cut(found, *pair)) is not None]
    return min(cuts, key=lambda cut: cut.kept, default=None)


def _cut(found: Comparison, place: int, source: int) -> Cut | None:
    rows = {row.block: row.gram for row in found.blocks}
    own, other = found.total.gram[place][place], found.total.gram[source][source]
    if not own or not other or found.total.cosines[place][source] <= 0.0:
        return None
    strengths = {
        block: gram[source][place] / gram[source][source] if gram[source][source] else 0.0
        for block, gram in rows.items()
    }
    left = sum(
        max(0.0, gram[place][place] - strengths[block] * gram[source][place])
        for block, gram in rows.items()
    )
    residual = _root(left / own)
    if residual > MERGED:
        return _lower_rank(found, place, source)
    shown = {b: s if abs(s) > TERM else 0.0 for b, s in strengths.items()}
    there = [shown[block] for block, gram in rows.items() if gram[source][source]]
    if max(there) - min(there) <= EVEN * max(map(abs, there)):
        return None
    kept = sum(rows[block][source][source] for block, s in shown.items() if s) / other
    return Cut(
        name=found.names[place],
        source=found.names[source],
        strengths={b: shown[b] for b, gram in rows.items() if gram[source][source]},
        kept=kept,
        residual=residual,
    )


def _lower_rank(found: Comparison, place: int, source: int) -> Cut | None:
    total = found.total
    rows = {row.block: row.gram for row in found.blocks if row.gram[source][source]}
    products = {block: max(gram[source][place], 0.0) for block, gram in rows.items()}
    strengths = {
        block: gram[place][place] / products[block] if products[block] else 0.0
        for block, gram in rows.items()
    }
    left = [strength for strength in strengths.values() if strength]
    if max(left) - min(left) > EVEN * max(left):
        return None
    kept = sum(products[block] / s for block, s in strengths.items() if s)
    if kept < BEST * total.best[source][place]:
        return None
    return Cut(
        name=found.names[place],
        source=found.names[source],
        strengths=strengths,
        kept=kept / total.gram[source][source],
        residual=None,
    )
