"""What the strengths of several LoRAs are divided by where a mean is wanted."""

from collections.abc import Sequence

from lorakit.methods.method import Method

_NO_SUM = 1e-8
"""mergekit does not divide by a smaller sum of strengths."""


def divisor(method: Method, strengths: Sequence[float]) -> float:
    """Return what `normalize` divides a method's sum of strength · ΔW by.

    The sum of the strengths' sizes; their mean for a method that averages by itself. The same LoRA
    several times is then itself.

    Args:
        method: its name and flavor.
        strengths: one a LoRA, none 0.

    Source: mergekit 0.1.5 for its flavor of sums: the sum with the signs, 1 where that is 0.
    """
    sizes = sum(map(abs, strengths))
    if method.flavor == "mergekit" and method.entry.family in ("sum", "elementwise"):
        return sum(strengths) if abs(sum(strengths)) >= _NO_SUM else 1.0
    return sizes / len(strengths) if method.entry.averages else sizes
