"""linear: the signed sum, which is what the web UI does with several LoRAs at once."""

from collections.abc import Sequence

from lorakit.linalg.factored import Factors, join, scaled


def linear(deltas: Sequence[tuple[Factors, float]]) -> Factors:
    """Return Σ strength · ΔW exactly: the factors side by side, never added.

    Args:
        deltas: (factors, strength) pairs of one module, [out, rank] and [rank, in] each.

    Returns:
        Factors whose rank is the sum of the ranks.

    Source: task arithmetic, arXiv 2212.04089; PEFT's `cat`.
    """
    return join([scaled(factors, strength) for factors, strength in deltas])
