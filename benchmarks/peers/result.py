"""What a comparison with a peer found."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from torch import Tensor

from lorakit.lorafile import LoraFile

Result = TypeVar("Result")
Shape = tuple[int, int]
LONG = 5.0
"""Seconds after which a second call would change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """What one program took: seconds, and its error against the truth in float64."""

    seconds: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A job that lorakit and a peer did on the same inputs in the same run."""

    job: str
    ours: Took
    theirs: Took

    def line(self, peer: str) -> str:
        """Say who took how long, and with what error."""
        ours, theirs = self.ours, self.theirs
        return (
            f"  {self.job}: lorakit {ours.seconds:.2f} s, error {ours.error:.3e}; "
            f"{peer} {theirs.seconds:.2f} s, error {theirs.error:.3e}; "
            f"ratio {theirs.seconds / ours.seconds:.1f}"
        )


def installed(package: str) -> str | None:
    """Return the version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """Return what a function returns, and the seconds of the faster of two calls.

    The first one may load code, which does not matter where it takes long: that is called once.
    """
    seconds = math.inf
    while True:
        before, start = seconds, time.perf_counter()
        found = function()
        seconds = min(before, time.perf_counter() - start)
        if seconds > LONG or before < math.inf:
            return found, seconds


def error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return ‖found − exact‖ / ‖exact‖ over all layers together.

    Args:
        pairs: found and exact of each layer, exact in float64.
    """
    off = whole = 0.0
    for found, exact in pairs:
        off += float((found.double() - exact).square().sum())
        whole += float(exact.square().sum())
    return float((off / whole) ** 0.5)


def lora_error(lora: LoraFile, exact: Mapping[str, Tensor]) -> float:
    """Return the error of a LoRA of linear layers that came out of lorakit."""
    factors = {layer: adapter.tensors() for layer, adapter in lora.adapters.items()}
    scales = {layer: float(parts["alpha"]) / len(parts["down"]) for layer, parts in factors.items()}
    return error(
        (scales[layer] * (parts["up"] @ parts["down"]), exact[layer])
        for layer, parts in ((layer, factors[layer]) for layer in exact)
    )


def narrowed(shapes: Iterable[Shape], factor: int) -> dict[str, Shape]:
    """Return the shapes of layers divided by a factor, each under a name of its own."""
    return {
        f"layers_{place}_linear": (rows // factor, columns // factor)
        for place, (rows, columns) in enumerate(shapes)
    }
