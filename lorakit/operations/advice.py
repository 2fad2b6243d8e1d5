"""One plain sentence on what a comparison means for a merge."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from lorakit.operations.comparison import Compared

SAME = 0.98
"""Cosines above are of one LoRA, or of trainings of one thing."""
AGAINST = -0.1
"""Cosines below are of LoRAs that weaken each other."""
ALIKE = 0.3
MERGED = 0.05
"""Below this residual one is a weighted sum of the others."""
TERM = 0.005
"""Below this a share is none."""
SHARED = 3.0
"""Overlaps above so many times chance are no chance, if they are over `NOTED` too."""
NOTED = 0.2


def advice(names: Sequence[str], total: Compared, kind: str) -> str:
    """Return what to know before these are merged, with the number that decides.

    Looked at in this order: whether the last is a weighted sum of the others; whether two are
    nearly the same; whether two pull against each other; whether two are much alike; whether two
    share their directions far above chance. Else they have little to do with each other.

    Args:
        names: of what is compared.
        total: all layers together.
        kind: "loras", "models" or "changes".
    """
    if kind == "models":
        distance, cosine = total.distances[0][1], total.cosines[0][1]
        if distance == 0.0:
            return f"{names[0]} and {names[1]} have equal weights."
        return (
            f"{names[1]} is {distance:.1%} of its size away from {names[0]} (cosine {cosine:.4f}); "
            "extract takes the difference out as a LoRA."
        )
    return _mixture(names, total) or _pair(names, total) or _independent(names, total)


def _mixture(names: Sequence[str], total: Compared) -> str:
    if len(names) < 3 or total.gram[-1][-1] <= 0.0:
        return ""
    gram = np.array(total.gram)
    shares = np.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1], rcond=1e-10)[0]
    rest = gram[-1, -1] - 2 * shares @ gram[:-1, -1] + shares @ gram[:-1, :-1] @ shares
    residual = float(np.sqrt(max(rest, 0.0) / gram[-1, -1]))
    if residual > MERGED:
        return ""
    terms = [f"{s:.2f}·{name}" for s, name in zip(shares, names, strict=False) if abs(s) > TERM]
    if len(terms) < 2:
        return ""
    told = f"{max(residual, 1e-4):.2%}"
    return f"{names[-1]} is {' + '.join(terms)} to within {told}: a merge of these."


def _pair(names: Sequence[str], total: Compared) -> str:
    pairs = list(combinations(range(len(names)), 2))
    cosines = total.cosines
    high = max(pairs, key=lambda p: cosines[p[0]][p[1]])
    low = min(pairs, key=lambda p: cosines[p[0]][p[1]])
    most, least = cosines[high[0]][high[1]], cosines[low[0]][low[1]]
    if most > SAME:
        return (
            f"{names[high[0]]} and {names[high[1]]} are nearly the same (cosine {most:.3f}): their "
            "strengths add up; take one of them, or --method karcher for their mean."
        )
    if least < AGAINST:
        return (
            f"{names[low[0]]} and {names[low[1]]} pull against each other (cosine {least:.2f}) and "
            "weaken each other in a sum; try --method ties, or cut the blocks where they fight."
        )
    if most > ALIKE:
        return (
            f"{names[high[0]]} and {names[high[1]]} are much alike (cosine {most:.2f}): a sum "
            "overshoots; lower the strengths, or try --match-norm mean."
        )
    return _shared(names, total, pairs)


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


def _independent(names: Sequence[str], total: Compared) -> str:
    cosines = total.cosines
    largest = max(abs(cosines[i][j]) for i, j in combinations(range(len(names)), 2))
    return (
        f"They have little to do with each other (largest cosine {largest:.2f}): --method linear "
        "keeps each as it is."
    )
