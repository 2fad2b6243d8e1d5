"""One plain sentence on what a comparison means for a merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lorakit.operations.comparison import Compared, Comparison

SAME = 0.98
"""Cosines above are of one LoRA, or of trainings of one thing."""
AGAINST = -0.1
"""Cosines below are of LoRAs that weaken each other."""
OPPOSED, NOTICED = 0.6, -0.02
"""A weighted conflict above, at a cosine below: they fight where they meet, and seldom meet."""
ALIKE = 0.3
"""Cosines above are of LoRAs that do partly the same."""
MERGED, MOSTLY = 0.05, 0.3
"""Below this residual one is a weighted sum of the others; below the second it mostly is."""
TERM = 0.005
"""Below this a share is none."""
SHARED = 3.0
"""Overlaps above so many times chance are no chance, if they are over `NOTED` too."""
NOTED = 0.2


def advice(found: Comparison, *, others: int | None = None) -> str:
    """Return what to know before these are merged, with the number that decides.

    Looked at in this order: whether something is there at all; whether one is a weighted sum of
    the others, the last first (a residual below 0.05, or below 0.3 for a merge that was cut or
    trained on); whether two are nearly the same (a cosine above 0.98); whether two pull against
    each other (below -0.1, or below -0.02 with over 60 % of what they share in opposite signs);
    whether two are much alike (above 0.3); whether two share over 20 % of their directions, and
    three times what chance gives. Else they have little to do with each other.

    Args:
        found: all but the advice.
        others: how many tensors beside the layers differ, where they were compared.
    """
    if found.kind == "models":
        return _models(found, others)
    return (
        _absent(found) or _mixture(found.names, found.total) or _pair(found) or _independent(found)
    )


def _models(found: Comparison, others: int | None) -> str:
    names, distance = found.names, found.total.distances[0][1]
    if distance:
        return (
            f"{names[1]} is {_percent(distance)} of {names[0]}'s size away from it (cosine "
            f"{found.total.cosines[0][1]:.4f}); extract takes the difference out as a LoRA."
        )
    if others:
        return (
            f"{names[0]} and {names[1]} are equal in every layer that a LoRA can change, but differ"
            f" in {others} other tensors; extract --as full takes norms and biases out."
        )
    where = "every layer that a LoRA can change" if others is None else "every weight"
    return f"{names[0]} and {names[1]} are equal in {where}."


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-3 else f"{100 * share:.2g}%"


def _absent(found: Comparison) -> str:
    """Say which one changes nothing at all."""
    none = [n for n, norm in zip(found.names, found.total.norms, strict=True) if norm == 0.0]
    if not none:
        return ""
    if found.kind == "changes":
        return f"{none[0]} does not differ from the first model, so there is nothing to compare."
    return f"{none[0]} changes nothing at this strength (norm 0): leave it out, or raise it."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixture:
    """One as a weighted sum of the others: shares by place, and what is left, relative."""

    place: int
    shares: tuple[tuple[int, float], ...]
    residual: float


def _mixture(names: Sequence[str], total: Compared) -> str:
    count = len(names)
    if count < 3:
        return ""
    tried = [_solved(total, place) for place in (count - 1, *range(count - 1))]
    found = [one for one in tried if one is not None]
    # Of A, B and their merge each is a sum of the others: the merge has no share below zero.
    natural = [one for one in found if all(share > 0 for _, share in one.shares)]
    if not found:
        return ""
    one = (natural or found)[0]
    terms = "".join(
        f" {'-' if share < 0 else '+'} {abs(share):.2f}·{names[at]}" for at, share in one.shares
    )
    terms = terms.removeprefix(" +").lstrip()
    if one.residual > MERGED:
        return (
            f"{names[one.place]} is mostly {terms}, {one.residual:.0%} of it is left: a merge of "
            "these that was cut or trained on."
        )
    told = f"{max(one.residual, 1e-4):.2%}"
    return f"{names[one.place]} is {terms} to within {told}: a merge of these."


def _solved(total: Compared, place: int) -> _Mixture | None:
    """Return the least-squares sum of the others; None where it misses, or one of them does it."""
    gram = np.array(total.gram)
    rest = [at for at in range(len(gram)) if at != place]
    own, products = gram[place, place], gram[rest, place]
    inside = gram[np.ix_(rest, rest)]
    shares = np.linalg.lstsq(inside, products, rcond=1e-10)[0]
    left = own - 2 * shares @ products + shares @ inside @ shares
    residual = float(np.sqrt(max(left, 0.0) / own))
    alone = float(np.sqrt(max(1.0 - float(np.max(products**2 / np.diag(inside))) / own, 0.0)))
    terms = tuple((at, float(s)) for at, s in zip(rest, shares, strict=True) if abs(s) > TERM)
    if residual > MOSTLY or residual > alone / 2 or alone < TERM or len(terms) < 2:
        return None
    return _Mixture(place=place, shares=terms, residual=residual)


def _pair(found: Comparison) -> str:
    names, total = found.names, found.total
    pairs = list(combinations(range(len(names)), 2))
    cosines = total.cosines
    high = max(pairs, key=lambda p: cosines[p[0]][p[1]])
    most = cosines[high[0]][high[1]]
    both = f"{names[high[0]]} and {names[high[1]]}"
    if most > SAME and found.kind == "changes":
        return f"{both} changed the first model in nearly the same way (cosine {most:.3f})."
    if most > SAME:
        how = "take one of them, or --method karcher for their mean, or lower the strengths"
        return f"{both} are nearly the same (cosine {most:.3f}): their strengths add up; {how}."
    if told := _fight(found, pairs):
        return told
    if most > ALIKE:
        how = "lower the strengths, or try --match-norm mean"
        return f"{both} are much alike (cosine {most:.2f}): a sum overshoots; {how}."
    return _shared(names, total, pairs)


def _fight(found: Comparison, pairs: Sequence[tuple[int, int]]) -> str:
    cosines, opposed = found.total.cosines, found.total.weighted_conflict
    low = min(pairs, key=lambda p: cosines[p[0]][p[1]])
    i, j = low
    least = cosines[i][j]
    if least < AGAINST:
        number = f"cosine {least:.2f}"
    else:
        meeting = [p for p in pairs if cosines[p[0]][p[1]] < NOTICED]
        i, j = max(meeting, key=lambda p: opposed[p[0]][p[1]], default=low)
        if not meeting or opposed[i][j] < OPPOSED:
            return ""
        number = f"{opposed[i][j]:.0%} of what both change has opposite signs"
    worst = min(found.blocks, key=lambda block: block.gram[i][j]).block
    return (
        f"{found.names[i]} and {found.names[j]} pull against each other ({number}), most in "
        f"{worst}, and weaken each other in a sum; try --method ties, or cut that block."
    )


def _shared(names: Sequence[str], total: Compared, pairs: Sequence[tuple[int, int]]) -> str:
    if not total.overlap:
        return ""
    i, j = max(pairs, key=lambda p: total.overlap[p[0]][p[1]])
    found, expected = total.overlap[i][j], total.chance[i][j]
    if found < NOTED or found < SHARED * expected:
        return ""
    return (
        f"{names[i]} and {names[j]} use the same directions ({found:.0%} of them, by chance "
        f"{expected:.0%}) for different changes; if they disturb each other try --method tsv."
    )


def _independent(found: Comparison) -> str:
    cosines = found.total.cosines
    largest = max(abs(cosines[i][j]) for i, j in combinations(range(len(found.names)), 2))
    return (
        f"They have little to do with each other (largest cosine {largest:.2f}): --method linear "
        "keeps each as it is."
    )
