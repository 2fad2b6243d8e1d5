"""Full-rank changes: ΔW itself, or the value that takes the weight's place."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lorakit.adapters.adapter import is_vector
from lorakit.adapters.checks import check_values, shapes_of
from lorakit.errors import AdapterError

DIFFS = ("diff", "w_norm", "diff_b", "b_norm", "lora_bias")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Full:
    """ΔW itself, of a weight, a norm or a bias.

    Args:
        diff: [out], [out, in] or [out, in, kh, kw].
        role: how it is stored: `diff`, `w_norm`, `diff_b`, `b_norm`.
    """

    diff: Tensor
    role: str = "diff"

    @property
    def kind(self) -> str:
        """'full', or 'vector' for a bias or a norm."""
        return "vector" if is_vector(self.shape) else "full"

    @property
    def rank(self) -> int | None:
        """None: there are no factors."""
        return None

    @property
    def needs_base(self) -> bool:
        """False: ΔW is the same on every base."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW."""
        return tuple(self.diff.shape)

    def change(self, base: Tensor | None = None) -> Tensor:
        """Return ΔW, [out, in · kh · kw] or one column, in fp64."""
        del base
        return self.diff.double().reshape(self.diff.shape[0], -1)

    def scaled(self, strength: float, base: Tensor | None = None) -> "Full":
        """Scale ΔW, in fp32."""
        del base
        return replace(self, diff=self.diff.float() * strength)

    def rows(self, start: int, stop: int) -> "Full":
        """Return the change of some outputs."""
        return replace(self, diff=self.diff[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor by its role."""
        return {self.role: self.diff}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replacement:
    """The value that takes the weight's place: ΔW = value − W."""

    value: Tensor

    @property
    def kind(self) -> str:
        """'set_weight'."""
        return "set_weight"

    @property
    def rank(self) -> int | None:
        """None: there are no factors."""
        return None

    @property
    def needs_base(self) -> bool:
        """True."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.value.shape)

    def change(self, base: Tensor | None = None) -> Tensor:
        """Return value − W in fp64, [out, in · kh · kw] or one column."""
        if base is None:
            raise AdapterError(
                "is a value that takes the weight's place (set_weight), so its change depends on "
                "the weight; name the model with --against, or bake the LoRA into it with --into"
            )
        return self.value.double().reshape(base.shape) - base.double()

    def scaled(self, strength: float, base: Tensor | None = None) -> "Replacement":
        """Return the value itself at strength 1, W + strength · (value − W) on a base."""
        if strength == 1:
            return self
        change = self.change(base)
        whole = change * (strength - 1) + self.value.double().reshape(change.shape)
        return replace(self, value=whole.float().reshape(self.shape))

    def rows(self, start: int, stop: int) -> "Replacement":
        """Return the values of some outputs."""
        return replace(self, value=self.value[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor by its role."""
        return {"set_weight": self.value}


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Full:
    """Check a module's tensor and make a `Full` of it.

    Args:
        tensors: one, by its role; an alpha beside it says nothing.
        alpha: likewise.

    Raises:
        AdapterError: there is more than one.
        NumericsError: a value is not finite.
    """
    del alpha
    check_values(tensors)
    found = [(role, tensor) for role, tensor in tensors.items() if role in DIFFS]
    if len(found) != 1:
        raise AdapterError(f"expected one difference, found {shapes_of(tensors)}")
    ((role, diff),) = found
    return Full(diff=diff, role="diff_b" if role == "lora_bias" else role)


def build_bias(tensors: Mapping[str, Tensor], alpha: float | None) -> Full | Replacement:
    """Make what changes a bias: a difference, or the value that takes its place.

    Raises:
        AdapterError: it is no vector, or there is more than one.
        NumericsError: a value is not finite.
    """
    found = (build_replacement if "set_weight" in tensors else build)(tensors, alpha)
    if not is_vector(found.shape):
        raise AdapterError(f"expected a vector as the change of a bias, found {shapes_of(tensors)}")
    return found


def build_replacement(tensors: Mapping[str, Tensor], alpha: float | None) -> Replacement:
    """Check a module's tensor and make a `Replacement` of it; arguments as for `build`."""
    del alpha
    check_values(tensors)
    if "set_weight" not in tensors:
        raise AdapterError(f"expected set_weight, found {shapes_of(tensors)}")
    return Replacement(value=tensors["set_weight"])
