"""Ways to combine the ΔW of one module: one function a method, and the table of them."""

from collections.abc import Callable, Mapping, Sequence

from lorakit.linalg.factored import Factors
from lorakit.methods.linear import linear

__all__ = ["METHODS", "linear"]

METHODS: Mapping[str, Callable[[Sequence[tuple[Factors, float]]], Factors]] = {"linear": linear}
