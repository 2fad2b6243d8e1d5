"""GLoRA: ΔW = alpha / rank · (W · a1 · a2 + b1 · b2), a change that depends on the weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters.checks import (
    alpha_tensor,
    base_of,
    check_values,
    needed,
    number,
    shapes_of,
)
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors

ROLES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Glora:
    """A low-rank change, and another one of the weight's inputs.

    Args:
        parts: `a1.weight` [in, rank], `a2.weight` [rank, in], `b1.weight` [out, rank], `b2.weight`
            [rank, in] or [rank, in, kh, kw].
        old: whether the parts are LyCORIS's first, transposed: ΔW = b2 · b1 + (W · a2) · a1.
        alpha: the stored one, raw also with rsLoRA.
    """

    parts: Mapping[str, Tensor]
    old: bool
    alpha: float

    @property
    def kind(self) -> str:
        """'glora'."""
        return "glora"

    @property
    def rank(self) -> int:
        """The rank of each of the two products."""
        return int(self._factors()[1].shape[0])

    @property
    def needs_base(self) -> bool:
        """True."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in) or (out, in, kh, kw)."""
        up, down = self._factors()[2:]
        return (int(up.shape[0]), *map(int, down.shape[1:]))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a1 [in, rank], a2 [rank, in], b1 [out, rank], b2 [rank, in, …]."""
        a1, a2, b1, b2 = (self.parts[role] for role in ROLES)
        return (a2, a1, b2, b1) if self.old else (a1, a2, b1, b2)

    def change(self, base: Tensor | None = None) -> Factors | Tensor:
        """Return ΔW as factors of rank 2r, of a linear layer; dense of a kernel.

        Source: arXiv 2306.07967; LyCORIS, which contracts a1 over the input channels.
        """
        weight = base_of(base, self.shape, "GLoRA")
        a1, a2, b1, b2 = (factor.double() for factor in self._factors())
        a1, a2, b1 = a1.flatten(1), a2.flatten(1), b1.flatten(1)
        scale = self.alpha / self.rank
        if len(self.shape) == 2:
            up = torch.cat([weight @ a1, b1], dim=1) * scale
            return Factors(up=up, down=torch.cat([a2, b2.flatten(1)]))
        kernels = weight.reshape(self.shape)
        inside = torch.einsum("oi...,ir,rj->oj...", kernels, a1, a2).flatten(1)
        return (inside + b1 @ b2.flatten(1)) * scale

    def scaled(self, strength: float, base: Tensor | None = None) -> "Glora":
        """Scale ΔW once: the size goes into alpha, the sign into one factor of each product."""
        del base
        parts = dict(self.parts)
        if strength < 0:
            parts |= {role: -parts[role] for role in ("a1.weight", "b1.weight")}
        return replace(self, parts=parts, alpha=self.alpha * abs(strength))

    def rows(self, start: int, stop: int) -> "Glora":
        """Return the GLoRA of some outputs."""
        role = "b2.weight" if self.old else "b1.weight"
        return replace(self, parts={**self.parts, role: self.parts[role][start:stop]})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        return {**self.parts, "alpha": alpha_tensor(self.alpha)}


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Glora:
    """Check a module's tensors and make a `Glora` of them.

    Args:
        tensors: by role.
        alpha: what to take where there is no `alpha` tensor; None for the rank.

    Raises:
        AdapterError: a factor is missing, or shapes do not fit each other.
        NumericsError: a value is not finite.
    """
    a1, a2, b1, b2 = needed(tensors, *ROLES)
    check_values(tensors)
    if "bm.weight" in tensors or min(t.ndim for t in (a1, a2, b1, b2)) < 2:
        raise AdapterError(f"expected GLoRA of four factors, found {shapes_of(tensors)}")
    new, old = _fits(a1, a2, b1, b2), _fits(a2, a1, b2, b1)
    if not new and not old:
        raise AdapterError(f"expected factors that fit each other, found {shapes_of(tensors)}")
    if new and old:
        # Those of a square layer fit both ways round; the shorter side is the rank.
        old = a1.shape[0] < a1.shape[1]
        if a1.shape[0] == a1.shape[1]:
            raise AdapterError(
                f"expected shapes that tell inputs from ranks, found {shapes_of(tensors)}"
            )
    if "alpha" in tensors:
        alpha = number(tensors["alpha"])
    parts = {role: tensors[role] for role in ROLES}
    found = Glora(parts=parts, old=old, alpha=1.0)
    return replace(found, alpha=float(found.rank) if alpha is None else alpha)


def _fits(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Tell whether the factors are a1 [in, r], a2 [r, in], b1 [out, r] and b2 [r, in, …]."""
    rank, inputs = b2.shape[:2]
    sides = a1.shape[:2] == (inputs, rank) and a2.shape[:2] == (rank, inputs)
    points = all(math.prod(factor.shape[2:]) == 1 for factor in (a1, a2, b1))
    return sides and b1.shape[1] == rank and points
