"""What every kind of adapter can do."""

from typing import Protocol

from torch import Tensor

from lorakit.linalg.factored import Factors


def is_vector(shape: tuple[int, ...]) -> bool:
    """Tell whether ΔW of this shape has no rank: a bias's, a norm's, a modulation's [1, k, n]."""
    return len(shape) == 1 or (len(shape) == 3 and shape[0] == 1)


class Adapter(Protocol):
    """What every kind of adapter can do."""

    @property
    def kind(self) -> str:
        """The kind's name."""

    @property
    def rank(self) -> int | None:
        """The rank of the stored factors, None where there are none."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in), (out, in, kh, kw), or (out,) for a bias or a norm."""

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on the weight that it changes."""

    def change(self, base: Tensor | None = None) -> Factors | Tensor:
        """Return ΔW at strength 1: fp64 factors, or [out, in · kh · kw] where there are none.

        Args:
            base: the weight [out, in · kh · kw] in fp32, for the kinds that need it.
        """

    def scaled(self, strength: float, base: Tensor | None = None) -> "Adapter":
        """Return the same kind with strength · ΔW, exactly; AdapterError where it has none."""

    def rows(self, start: int, stop: int) -> "Adapter":
        """Return the adapter of some rows of the weight; AdapterError where the kind has none."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by role."""
