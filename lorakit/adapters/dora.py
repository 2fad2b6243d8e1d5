"""DoRA: W' = magnitude · V / ‖V‖ with V = W + ΔW, a change that depends on the weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.checks import base_of, check_values, shapes_of
from lorakit.adapters.lora import Lora
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors, dense

Axis = Literal["output", "input"]
PEFT_ROLES = ("lora_magnitude_vector", "magnitude")
ROLES = ("dora_scale", *PEFT_ROLES)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dora:
    """A direction and a magnitude for every output, or for every input.

    Args:
        inner: whose ΔW gives V = W + ΔW.
        magnitude: of V's rows [out, 1, …], or of its columns [1, in, …], as it is stored.
        role: `dora_scale`, or `lora_magnitude_vector` or `magnitude`, which are of outputs always.
        axis: what the norms are of: a row, or a column over all outputs and the kernel.
    """

    inner: Adapter
    magnitude: Tensor
    role: str = "dora_scale"
    axis: Axis = "output"

    @property
    def kind(self) -> str:
        """'dora', or 'dora of loha' and the like."""
        plain = self.inner.kind in ("lora", "locon")
        return "dora" if plain else f"dora of {self.inner.kind}"

    @property
    def rank(self) -> int | None:
        """The rank of the stored factors."""
        return self.inner.rank

    @property
    def needs_base(self) -> bool:
        """True."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in) or (out, in, kh, kw)."""
        return self.inner.shape

    def change(self, base: Tensor | None = None) -> Tensor:
        """Return W' − W in fp64.

        Source: arXiv 2402.09353; PEFT; LyCORIS, which adds eps to the norm under its own name.
        """
        weight = base_of(base, self.shape, "DoRA")
        direction = weight + self._delta()
        magnitude, norms = self._sides(direction)
        return direction * (magnitude / norms) - weight

    def _delta(self) -> Tensor:
        change = self.inner.change()
        return dense(change) if isinstance(change, Factors) else change.double()

    def _sides(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the magnitudes and the norms, both to be broadcast over [out, in · kh · kw]."""
        eps = float(torch.finfo(torch.float32).eps) if self.role == "dora_scale" else 0.0
        magnitude = self.magnitude.double().flatten()
        if self.axis == "output":
            norms = torch.linalg.vector_norm(direction, dim=1, keepdim=True) + eps
            return magnitude[:, None], _divisors(norms)
        kernels = direction.reshape(len(direction), magnitude.numel(), -1)
        norms = _divisors(torch.linalg.vector_norm(kernels, dim=(0, 2)) + eps)
        width = kernels.shape[2]
        return (
            magnitude.repeat_interleave(width)[None, :],
            norms.repeat_interleave(width)[None, :],
        )

    def scaled(self, strength: float, base: Tensor | None = None) -> "Dora":
        """Return the DoRA of the same rank whose change is strength · ΔW, exactly.

        With n = ‖V‖ and c = 1 − s + s · m / n, W + s (W' − W) is row by row (or column by column)
        c · (W + g · ΔW), where g = s · m / (n · c): so g scales the factor of that side, and the
        magnitude is c · ‖W + g · ΔW‖, with its sign.

        Raises:
            AdapterError: there is no base, the inner kind has no such factor, or c is 0 somewhere.
        """
        if strength == 1:
            return self
        weight = base_of(base, self.shape, "DoRA")
        if not isinstance(self.inner, Lora):
            raise AdapterError(
                f"is {self.kind}, which has no strength but 0 and 1; bake it with --into, or "
                "convert it with --as lora --against MODEL first"
            )
        delta = self._delta()
        magnitude, norms = self._sides(weight + delta)
        share = magnitude / norms
        whole = 1 - strength + strength * share
        if float(whole.abs().min()) < 1e-6:
            raise AdapterError(
                f"is DoRA that strength {strength:g} turns to zero in some output, where it has no "
                "direction; convert it with --as lora --against MODEL first"
            )
        by = strength * share / whole
        direction = weight + by * delta
        _, lengths = self._sides(direction)
        lengths = whole * lengths
        return replace(
            self, inner=self._turned(self.inner, by), magnitude=self._stored(lengths).float()
        )

    def _turned(self, inner: Lora, by: Tensor) -> Lora:
        factors = inner.change()
        if self.axis == "output":
            factors = Factors(up=factors.up * by, down=factors.down)
        else:
            factors = Factors(up=factors.up, down=factors.down * by)
        up = factors.up.float().reshape(*factors.up.shape, *(1 for _ in self.shape[2:]))
        down = factors.down.float().reshape(-1, *self.shape[1:])
        return Lora(up=up, down=down, alpha=float(factors.rank))

    def _stored(self, lengths: Tensor) -> Tensor:
        if self.axis == "input":
            step = lengths.numel() // self.magnitude.numel()
            lengths = lengths.flatten()[::step]
        return lengths.reshape(self.magnitude.shape)

    def rows(self, start: int, stop: int) -> "Dora":
        """Return the DoRA of some outputs, where the norms are theirs.

        Raises:
            AdapterError: the norms are of inputs over all outputs of the fused layer.
        """
        if self.axis == "input":
            raise AdapterError(
                "is DoRA by inputs, whose norms are of the whole fused layer; bake it into a model "
                "that holds the layer fused, or convert it with --as lora --against MODEL"
            )
        flat = self.magnitude.flatten()[start:stop]
        shape = [-1 if side > 1 else 1 for side in self.magnitude.shape]
        return replace(self, inner=self.inner.rows(start, stop), magnitude=flat.reshape(shape))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        return self.inner.tensors() | {self.role: self.magnitude}


def wrap(inner: Adapter, tensors: Mapping[str, Tensor]) -> Dora:
    """Make a `Dora` of an adapter and the magnitude beside it.

    The name decides the axis: PEFT's and ai-toolkit's are of outputs. Of `dora_scale` the shape
    does: [out] and [out, 1, …] are of outputs, [1, in, …] of inputs.

    Raises:
        AdapterError: the magnitude fits neither side.
        NumericsError: a value is not finite.

    Source: LyCORIS since 3.2 writes outputs, before and OneTrainer inputs.
    """
    found = {role: tensors[role] for role in ROLES if role in tensors}
    check_values(found)
    if len(found) != 1:
        raise AdapterError(f"expected one magnitude, found {shapes_of(found)}")
    ((role, magnitude),) = found.items()
    outs, ins = inner.shape[:2]
    shape = tuple(side for side in magnitude.shape if side != 1) or (1,)
    by_output = magnitude.ndim == 1 or magnitude.shape[0] != 1 or role in PEFT_ROLES
    if (by_output or outs == 1) and shape == (outs,):
        return Dora(inner=inner, magnitude=magnitude, role=role, axis="output")
    # LoHa and LoKr hold the kernel flat with the inputs; the magnitude tells them apart.
    folded = len(inner.shape) == 2 and magnitude.ndim > 2 and ins % magnitude.numel() == 0
    inputs = magnitude.numel() if folded else ins
    if not by_output and shape in ((inputs,), (1,)) and magnitude.numel() == inputs:
        return Dora(inner=inner, magnitude=magnitude, role=role, axis="input")
    raise AdapterError(
        f"expected a magnitude of {outs} outputs or {ins} inputs, found {role} "
        f"{list(magnitude.shape)}"
    )


def _divisors(norms: Tensor) -> Tensor:
    """Return norms to divide by: one for a zero V, whose V / ‖V‖ is then zero and not NaN."""
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def magnitude_for(base: Tensor, delta: Tensor, tuned: Tensor) -> Tensor:
    """Return the magnitudes [out] that bring a DoRA of given directions nearest to a weight.

    Row by row m = ⟨V / ‖V‖, W'⟩, the projection of W' on the direction: any other length on the
    same direction is further, that of a plain LoRA, m = ‖V‖, too.

    Args:
        base: W [out, in · kh · kw].
        delta: ΔW of the directions, so that V = W + ΔW.
        tuned: W' [out, in · kh · kw].
    """
    direction = base + delta
    eps = float(torch.finfo(torch.float32).eps)
    norms = torch.linalg.vector_norm(direction, dim=1)
    along = (direction * tuned).sum(dim=1) / norms.clamp(min=eps)
    # change() divides by ‖V‖ + eps.
    magnitudes: Tensor = along * (norms + eps) / norms.clamp(min=eps)
    return magnitudes
