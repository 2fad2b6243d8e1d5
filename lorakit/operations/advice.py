"""One plain sentence on what a comparison means for a merge."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from lorakit.names.blocks import format_ids
from lorakit.operations.comparison import Compared, Comparison
from lorakit.operations.mixtures import EVEN, MERGED, ROUNDED, TERM

SAME = 0.98
"""Cosines above are of one LoRA, or of trainings of one thing."""
AGAINST = -0.1
"""Cosines below are of LoRAs that weaken each other."""
OPPOSED, NOTICED = 0.6, -0.02
"""A weighted conflict above, at a cosine below: they fight where they meet, and seldom meet."""
ALIKE = 0.3
"""Cosines above are of LoRAs that do partly the same."""
GROUPS = 4
"""So many groups of blocks with weights of their own are named."""
SHARED = 3.0
"""Overlaps above so many times chance are no chance, if they are over `NOTED` too."""
NOTED = 0.2


def advice(found: Comparison, *, others: int | None = None) -> str:
    """Return what to know before these are merged, with the number that decides.

    Looked at in this order: whether something is there at all; whether one is a weighted sum of
    the others (a residual below 0.05, or below 0.3 for a merge that was cut or trained on), or is
    what a cut by blocks or to a lower rank left of one; whether two are nearly the same (a cosine
    above 0.98); whether two pull against each other (below -0.1, or below -0.02 with over 60 % of
    what they share in opposite signs); whether two are much alike (above 0.3); whether two share
    over 20 % of their directions, and three times what chance gives. Else they have little to do
    with each other.

    Args:
        found: all but the advice.
        others: how many tensors beside the layers differ, where they were compared.
    """
    if found.kind == "models":
        return _models(found, others)
    return _absent(found) or _mixture(found) or _cut(found) or _pair(found) or _independent(found)


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


def _mixture(found: Comparison) -> str:
    """Say which one is a weighted sum of the others."""
    one = found.mixture
    if one is None:
        return ""
    within = f"to within {_percent(max(one.residual, 1e-4))}"
    if one.residual <= ROUNDED * one.rounding:
        within += ", which its rounding explains"
    elif one.residual > MERGED:
        return (
            f"{one.name} is mostly {_sum(one.shares)}, {one.residual:.0%} of it is left: a merge "
            "of these that was cut or trained on."
        )
    if one.even:
        return f"{one.name} is {_sum(one.shares)} {within}: a merge of these."
    groups: dict[str, list[str]] = {}
    for block, part in one.blocks.items():
        groups.setdefault(_sum(part.shares), []).append(block)
    return f"{one.name} is a merge with weights by block, {within}: {_by_block(groups)}."


def _sum(shares: Mapping[str, float]) -> str:
    """Write shares of names as a sum, what is added first; those of nothing are left out."""
    terms = "".join(
        f" {'-' if share < 0 else '+'} {abs(share):.2f}·{name}"
        for name, share in sorted(shares.items(), key=lambda term: term[1] < 0)
        if abs(share) > TERM
    )
    return terms.removeprefix(" +").lstrip() or "nothing"


def _by_block(groups: Mapping[str, Sequence[str]]) -> str:
    """Write what there is in which blocks, the most frequent first."""
    ranked = sorted(groups, key=lambda said: -len(groups[said]))
    told = [f"{said} in {format_ids(groups[said])}" for said in ranked[:GROUPS]]
    rest = sum(len(groups[said]) for said in ranked[GROUPS:])
    return "; ".join([*told, f"and other weights in {rest} more blocks"] if rest else told)


def _cut(found: Comparison) -> str:
    """Say which LoRA is what was left of another."""
    cut = found.cut
    if cut is None:
        return ""
    groups: dict[str, list[str]] = {}
    for block, strength in cut.strengths.items():
        said = f"{strength:.2f}·{cut.source}" if strength else "nothing"
        groups.setdefault(said, []).append(block)
    if cut.residual is not None:
        return (
            f"{cut.name} is {cut.source} cut by blocks, to within "
            f"{_percent(max(cut.residual, 1e-4))}: {_by_block(groups)}. "
            f"{_percent(cut.kept)} of the change is left."
        )
    lost = groups.get("nothing", [])
    strength = next(s for s in cut.strengths.values() if s)
    rest = f", with nothing in {format_ids(lost)}" if lost else ""
    at = "" if abs(strength - 1) <= EVEN else f" at {strength:.2f}"
    return (
        f"{cut.name} is {cut.source}{at} cut to a lower rank{rest}: {_percent(cut.kept)} of the "
        "change is left."
    )


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
        one, other = (names[at] for at in high)
        size = total.norms[high[1]] / total.norms[high[0]]
        than = "" if abs(size - 1) <= EVEN else f"; {other} is {size:.2f} times as strong as {one}"
        return (
            f"{both} are nearly the same (cosine {most:.3f}{than}): their strengths add up; {how}."
        )
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
