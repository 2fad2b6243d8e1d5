"""A module's tensors and its ΔW: one file a kind, and the table of them.

A kind is a function from the module's tensors by role to an `Adapter`. A new kind is its file here
and its line in `BUILDERS`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from lorakit.adapters import lora
from lorakit.adapters.lora import Lora
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors

__all__ = ["BUILDERS", "Adapter", "Lora", "build"]


class Adapter(Protocol):
    """What every kind of adapter can do."""

    @property
    def kind(self) -> str:
        """The kind's name."""

    @property
    def rank(self) -> int:
        """The rank of the stored factors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in) or (out, in, kh, kw)."""

    def factors(self) -> Factors:
        """Return ΔW as fp64 factors, [out, rank] and [rank, in · kh · kw]."""

    def scaled(self, strength: float) -> "Adapter":
        """Scale ΔW once, exactly."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by role."""


BUILDERS: Mapping[str, Callable[[Mapping[str, Tensor], float | None], Adapter]] = {
    "lora": lora.build,
}

_NAMES = {
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "oft": "OFT or BOFT",
    "ia3": "IA3",
    "full": "a full-rank difference",
    "norm": "a norm difference",
    "bias": "a bias difference",
    "embedding": "a bundled embedding",
}


def build(kinds: set[str], tensors: Mapping[str, Tensor], alpha: float | None) -> Adapter:
    """Make the adapter of one module from its tensors by role.

    Args:
        kinds: the kinds that the module's keys speak of.
        tensors: by role.
        alpha: what to take where no tensor says it; None for the rank.

    Raises:
        AdapterError: the kind is one that lorakit does not know yet, or the tensors do not fit.
        NumericsError: a value is not finite.
    """
    others = sorted(kinds - BUILDERS.keys())
    if others:
        found = " and ".join(_NAMES.get(kind, kind) for kind in others)
        raise AdapterError(
            f"is {found}; lorakit reads LoRA and LoCon, so bake it with the tool that made it"
        )
    (kind,) = kinds
    return BUILDERS[kind](tensors, alpha)
