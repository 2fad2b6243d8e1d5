"""What a user should know of a merge by a method that is not the plain sum."""

import math
from collections.abc import Mapping, Sequence

from lorakit.adapters import Adapter
from lorakit.linalg.factored import Factors, join, norm, scaled
from lorakit.linalg.tiles import size
from lorakit.methods.angular import stock_factor
from lorakit.methods.delta import Delta, alone
from lorakit.methods.dropping import LEVELS
from lorakit.methods.linear import linear
from lorakit.methods.method import Method
from lorakit.methods.table import acting
from lorakit.operations.mixing import Mix, Part, deltas_of

FAINT = 0.5
"""Below this factor model-stock takes most of the change away."""


def remarks(
    method: Method,
    modules: Mapping[str, Sequence[Part]],
    merged: Mapping[str, Adapter] | None = None,
) -> tuple[str, ...]:
    """Return what is to be said of what a method does to these LoRAs.

    Layers whose change needs the model, or whose factors were not read, are left out of account.

    Args:
        method: with every parameter set.
        modules: module -> its parts.
        merged: module -> what was made of them, where a LoRA was made.
    """
    if method.name not in ("dare-linear", "della", "model-stock"):
        return ()
    known = {m: parts for m, parts in modules.items() if parts and _readable(parts)}
    changes = map(acting, map(deltas_of, known.values()))
    met = [deltas for deltas in changes if not alone(deltas)]
    if not met:
        return ()
    if method.name == "model-stock":
        return _stock(met)
    noise = expected_noise(method.density or 1.0, met, epsilon=method.epsilon or 0.0)
    off = None if merged is None else distance_from_sum(merged, known, method)
    ends = "" if off is None else f", of which {off:.2f} are left in this LoRA"
    about = "at most" if method.epsilon else "about"
    return (
        f"{method.name} is the plain sum on average, plus noise of {about} {noise:.2f} times its "
        f"norm{ends}; --method linear has none.",
    )


def expected_noise(
    density: float, met: Sequence[Sequence[Delta]], *, epsilon: float = 0.0
) -> float:
    """Return √(E‖error‖²) / ‖Σ strength · ΔW‖ of random dropping, over all layers together.

    Source: E‖error‖² = Σ (1 / p − 1) · (strength · ΔW)², of independent masks that are rescaled by
    1 / p. Of della's chances, from density − epsilon to density + epsilon, the mean of 1 / p is
    taken: a bound, as the larger elements have the larger chances.
    """
    inverse = 1 / density
    if epsilon:
        least = max(density - epsilon, 1 / LEVELS)
        inverse = math.log((density + epsilon) / least) / (density + epsilon - least)
    parts = math.fsum((d.strength * size(d.change)) ** 2 for deltas in met for d in deltas)
    whole = math.fsum(size(linear(deltas)) ** 2 for deltas in met)
    return math.sqrt((inverse - 1) * parts / whole) if whole else math.inf


def _stock(met: Sequence[Sequence[Delta]]) -> tuple[str, ...]:
    factors = [stock_factor(deltas) for deltas in met]
    mean = math.fsum(factors) / len(factors)
    if mean >= FAINT:
        return ()
    return (
        f"model-stock multiplies the change by {mean:.2f} on average, because these LoRAs are "
        "nearly orthogonal; it is meant for several trainings of one concept, use --method linear.",
    )


def distance_from_sum(
    merged: Mapping[str, Adapter], modules: Mapping[str, Sequence[Part]], method: Method
) -> float | None:
    """Return ‖merged − sum‖ / ‖sum‖ over all layers that have factors.

    The sum is the plain one with all that the method does to its own result: its factor, its norm.

    Args:
        merged: module -> what was written for it; nothing counts as zero.
        modules: module -> the parts that were merged.
        method: with every parameter set.
    """
    off = whole = 0.0
    mix = Mix(method=method.without_noise)
    for module, parts in modules.items():
        plain = mix.of(module, parts)
        found = merged[module].change() if module in merged else None
        if not isinstance(plain, Factors) or not isinstance(found, Factors | None):
            continue
        whole += norm(plain) ** 2
        off += norm(plain if found is None else join([plain, scaled(found, -1.0)])) ** 2
    return math.sqrt(off / whole) if whole else None


def _readable(parts: Sequence[Part]) -> bool:
    tensors = (tensor for part in parts for tensor in part.adapter.tensors().values())
    return not any(p.adapter.needs_base for p in parts) and all(
        tensor.device.type != "meta" for tensor in tensors
    )
