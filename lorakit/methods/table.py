"""From a method's name to its function: the ΔW of several LoRAs become one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lorakit.linalg.factored import NOISE, Factors
from lorakit.linalg.tiles import Change, multiplied, size
from lorakit.methods.angular import karcher, model_stock, slerp
from lorakit.methods.calibration import pico
from lorakit.methods.ctm import ctm
from lorakit.methods.delta import Delta, alone
from lorakit.methods.elementwise import elementwise
from lorakit.methods.linear import linear
from lorakit.methods.method import Method
from lorakit.methods.sameness import unified
from lorakit.methods.spaces import in_core, in_knots
from lorakit.methods.strengths import divisor
from lorakit.methods.subspace import iso_c, iso_cts, tsv

Deltas = Sequence[Delta]

ANGULAR: Mapping[str, Callable[[Deltas, Method], Change]] = {
    "slerp": slerp,
    "karcher": karcher,
    "model-stock": model_stock,
}
SUBSPACE: Mapping[str, Callable[[Deltas, Method, int | None], Change]] = {
    "tsv": tsv,
    "iso-c": iso_c,
    "iso-cts": iso_cts,
    "ctm": ctm,
}
SPACE: Mapping[str, Callable[[Deltas, Callable[[Deltas], Change]], Change]] = {
    "full": lambda deltas, act: act(narrowed(deltas)),
    "core": in_core,
    "knots": in_knots,
}


def combine(
    deltas: Deltas,
    method: Method,
    *,
    module: str,
    rank: int | None = None,
    cuts: Mapping[str, float] | None = None,
) -> Change:
    """Combine the ΔW that several LoRAs have of one module.

    Args:
        deltas: at least one, all of one shape, strengths not 0, in an order that does not depend
            on the order of the user's arguments.
        method: with every parameter set, see `Method.filled`.
        module: the canonical name; it names the random streams.
        rank: how many directions the output will keep, where the user said so.
        cuts: owner -> the magnitude below which the whole model's elements are trimmed, for
            `scope` "model".

    Returns:
        The merged ΔW. Where one LoRA alone acts, lorakit's flavor of every method leaves it as it
        is: there is nothing to reconcile.
    """
    if method.flavor == "lorakit":
        deltas = acting(deltas)
    calibrated = method.calibrate == "pico" and not alone(deltas)
    found = _combined(
        pico(deltas) if calibrated else deltas, method, module=module, rank=rank, cuts=cuts
    )
    return multiplied(found, method.lambda_ * _norm_factor(deltas, method, found))


def _combined(
    deltas: Deltas,
    method: Method,
    *,
    module: str,
    rank: int | None,
    cuts: Mapping[str, float] | None,
) -> Change:
    family = method.entry.family
    if family == "elementwise":
        act = partial(elementwise, method=method, module=module, cuts=cuts or {})
        # A bias or a norm is one column: it has no directions to act in.
        space = SPACE["full" if deltas[0].shape[1] == 1 else method.space or "full"]
        return space(deltas, act)
    if method.normalize:
        whole = divisor(method, [delta.strength for delta in deltas])
        deltas = [replace(delta, strength=delta.strength / whole) for delta in deltas]
    if family == "angular" and not _trivial(deltas, method):
        return ANGULAR[method.name](deltas, method)
    if family == "subspace" and not _trivial(deltas, method) and deltas[0].shape[1] > 1:
        return SUBSPACE[method.name](deltas, method, rank)
    return linear(deltas)


def acting(deltas: Deltas) -> Deltas:
    """Return the ΔW that a method has to reconcile.

    Those that are zero are left out: a layer that is all zeros counts as one that is not there.
    Those that are equal are one, see `sameness.unified`.
    """
    return unified([delta for delta in deltas if _changes(delta)] or deltas[:1])


def _changes(delta: Delta) -> bool:
    change = delta.change
    if isinstance(change, Factors):
        return bool(change.up.any()) and bool(change.down.any())
    return bool(change.any())


def narrowed(deltas: Deltas) -> Deltas:
    """Return factors in fp32: whole matrices are made of them, twice as fast as in fp64.

    Deltas that share their ΔW still do.
    """
    changes = {id(delta.change): delta.change for delta in deltas}
    narrow = {
        name: Factors(up=change.up.float(), down=change.down.float())
        for name, change in changes.items()
        if isinstance(change, Factors)
    }
    return [replace(d, change=narrow.get(id(d.change), d.change)) for d in deltas]


def _trivial(deltas: Deltas, method: Method) -> bool:
    return method.flavor == "lorakit" and method.name != "tsv" and alone(deltas)


def _norm_factor(deltas: Deltas, method: Method, found: Change) -> float:
    """Return what gives the result the norm that `match_norm` asks for."""
    if method.match_norm in (None, "none") or alone(deltas):
        return 1.0
    norms = [abs(delta.strength) * size(delta.change) for delta in deltas]
    goal = sum(norms) / len(norms) if method.match_norm == "mean" else size(linear(deltas))
    whole = size(found)
    # What is left where all cancels is rounding.
    return goal / whole if whole > NOISE * max(norms) else 1.0
