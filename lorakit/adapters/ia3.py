"""IA3: a factor for every output, or for every input, of a weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lorakit.adapters.checks import check_values, number, shapes_of
from lorakit.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ia3:
    """ΔW = W ⊙ w by rows or columns; PEFT stores l = 1 + w.

    Args:
        factors: as stored: LyCORIS's `weight`, any shape of one long side; PEFT's `ia3_l` [out, 1]
            or [1, in].
        on_input: whether the factors are the inputs'.
        peft: whether 1 is to be taken off.
    """

    factors: Tensor
    on_input: bool
    peft: bool

    @property
    def kind(self) -> str:
        """'ia3'."""
        return "ia3"

    @property
    def rank(self) -> int | None:
        """None: there are no factors of low rank."""
        return None

    @property
    def needs_base(self) -> bool:
        """True."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, 0) or (0, in): the other side is the weight's, and not known here."""
        length = self.factors.numel()
        return (0, length) if self.on_input else (length, 0)

    def change(self, base: Tensor | None = None) -> Tensor:
        """Return W ⊙ w in fp64.

        Source: arXiv 2205.05638; LyCORIS and PEFT.
        """
        if base is None:
            raise AdapterError(
                "is IA3, whose change depends on the weight that it changes; name the model with "
                "--against, or bake the LoRA into it with --into"
            )
        wide = base.double()
        by = self.factors.double().flatten() - (1.0 if self.peft else 0.0)
        if not self.on_input:
            return wide * self._checked(by, len(wide))[:, None]
        # Only factors stored with a kernel's sides are those of a convolution.
        if self.factors.ndim < 3 or wide.shape[1] % by.numel():
            self._checked(by, wide.shape[1])
        kernels = wide.reshape(len(wide), by.numel(), -1)
        return (kernels * by[None, :, None]).reshape(wide.shape)

    def _checked(self, by: Tensor, length: int) -> Tensor:
        if by.numel() != length:
            raise AdapterError(
                f"expected {length} factors, found {by.numel()}; name the model that it was "
                "trained on"
            )
        return by

    def scaled(self, strength: float, base: Tensor | None = None) -> "Ia3":
        """Scale ΔW exactly: w, or l − 1."""
        del base
        wide = self.factors.float()
        return replace(self, factors=1 + (wide - 1) * strength if self.peft else wide * strength)

    def rows(self, start: int, stop: int) -> "Ia3":
        """Return the factors of some outputs; those of the inputs are all of theirs."""
        if self.on_input:
            return self
        flat = self.factors.flatten()[start:stop]
        return replace(self, factors=flat[:, None] if self.factors.ndim > 1 else flat)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        if self.peft:
            return {"ia3_l": self.factors}
        return {"weight": self.factors, "on_input": self.factors.new_tensor(float(self.on_input))}


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Ia3:
    """Check a module's tensors and make an `Ia3` of them.

    Args:
        tensors: `weight` and `on_input`, or PEFT's `ia3_l`.
        alpha: unused, IA3 has none.

    Raises:
        AdapterError: a tensor is missing.
        NumericsError: a value is not finite.
    """
    del alpha
    check_values(tensors)
    if "ia3_l" in tensors:
        factors = tensors["ia3_l"]
        if factors.ndim != 2 or 1 not in factors.shape:
            raise AdapterError(f"expected [out, 1] or [1, in], found {shapes_of(tensors)}")
        return Ia3(factors=factors, on_input=factors.shape[1] != 1, peft=True)
    if not {"weight", "on_input"} <= tensors.keys():
        raise AdapterError(f"expected weight and on_input, found {shapes_of(tensors)}")
    factors = tensors["weight"]
    if factors.numel() != max(factors.shape):
        raise AdapterError(f"expected one long side, found {shapes_of(tensors)}")
    return Ia3(factors=factors, on_input=bool(number(tensors["on_input"])), peft=False)
