"""A module's tensors and its ΔW: one file a kind, and the table of them.

A kind is a function from the module's tensors by role to an `Adapter`. A new kind is its file here
and its line in `BUILDERS`.
"""

import math
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from lorakit.adapters import dora, full, glora, ia3, loha, lokr, lora, oft
from lorakit.adapters.adapter import Adapter, is_vector
from lorakit.adapters.dora import Dora, magnitude_for
from lorakit.adapters.full import Full
from lorakit.adapters.ia3 import Ia3
from lorakit.adapters.lokr import Lokr
from lorakit.adapters.lora import Lora
from lorakit.adapters.rotated import Rotated
from lorakit.errors import AdapterError

__all__ = [
    "BUILDERS",
    "Adapter",
    "Dora",
    "Full",
    "Ia3",
    "Lokr",
    "Lora",
    "Rotated",
    "build",
    "is_vector",
    "magnitude_for",
]


LARGEST = 2**31
"""Weights of a layer: sixteen times those of the largest that any known model has."""
Builder = Callable[[Mapping[str, Tensor], float | None], Adapter]

BUILDERS: Mapping[str, Builder] = {
    "lora": lora.build,
    "loha": loha.build,
    "lokr": lokr.build,
    "glora": glora.build,
    "oft": oft.build,
    "ia3": ia3.build,
    "full": full.build,
    "bias": full.build_bias,
    "set": full.build_replacement,
}

_REFUSED = {
    "tlora": "T-LoRA, whose change depends on the time step",
    "reshape": "a change of a layer's shape (reshape_weight)",
    "sparse": "a sparse remainder (bias_indices)",
}


def build(kinds: Collection[str], tensors: Mapping[str, Tensor], alpha: float | None) -> Adapter:
    """Make the adapter of one module from its tensors by role.

    Args:
        kinds: the kinds that the module's keys speak of; `dora` wraps any that needs no base.
        tensors: by role.
        alpha: what to take where no tensor says it; None for the rank.

    Raises:
        AdapterError: the kind is one that lorakit does not know, or the tensors do not fit.
        NumericsError: a value is not finite.
    """
    refused = [_REFUSED[kind] for kind in sorted(kinds) if kind in _REFUSED]
    if refused:
        raise AdapterError(
            f"is {' and '.join(refused)}, which no weight can hold; use it in the tool that made it"
        )
    inner = sorted(set(kinds) - {"dora"})
    if len(inner) != 1:
        raise AdapterError(
            f"expected one kind of adapter, found {' and '.join(sorted(kinds))} "
            f"({', '.join(sorted(tensors))}); the file is incomplete or two files in one"
        )
    if "dora" not in kinds:
        return _sized(BUILDERS[inner[0]](tensors, alpha))
    parts = {role: tensor for role, tensor in tensors.items() if role not in dora.ROLES}
    found = _sized(BUILDERS[inner[0]](parts, alpha))
    if found.needs_base or is_vector(found.shape):
        raise AdapterError(f"expected a magnitude beside a LoRA, found it beside {found.kind}")
    return dora.wrap(found, tensors)


def _sized(found: Adapter) -> Adapter:
    """Refuse a ΔW that no layer has: two vectors of a few megabytes can claim one of terabytes."""
    if math.prod(found.shape) > LARGEST:
        raise AdapterError(
            f"expected a layer of at most {LARGEST} weights, found {list(found.shape)}; the file "
            "is damaged or made to fill your memory"
        )
    return found
