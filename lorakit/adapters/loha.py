"""LoHa: ΔW = alpha / rank · (w1a · w1b) ⊙ (w2a · w2b), each with a Tucker core where it has one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters.checks import alpha_tensor, check_values, needed, number, shapes_of
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loha:
    """The product, entry by entry, of two low-rank matrices.

    Args:
        parts: `hada_w1_a` [out, rank], `hada_w1_b` [rank, in · kh · kw], and those of w2; with
            Tucker cores `hada_t1` and `hada_t2` [rank, rank, kh, kw] the first are [rank, out].
        kernel: (in,) or (in, kh, kw).
        alpha: ΔW = alpha / rank · w1 ⊙ w2.
    """

    parts: Mapping[str, Tensor]
    kernel: tuple[int, ...]
    alpha: float

    @property
    def kind(self) -> str:
        """'loha'."""
        return "loha"

    @property
    def rank(self) -> int:
        """The rank of each of the two; that of their product may be its square."""
        return int(self.parts["hada_w1_b"].shape[0])

    @property
    def needs_base(self) -> bool:
        """False: ΔW is the same on every base."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in) or (out, in, kh, kw)."""
        first = self.parts["hada_w1_a"]
        return (int(first.shape[1 if "hada_t1" in self.parts else 0]), *self.kernel)

    def change(self, base: Tensor | None = None) -> Factors | Tensor:
        """Return ΔW: factors of rank² by the products of all pairs, dense where that is no less.

        Source: Khatri-Rao: (a · b) ⊙ (c · d) = (a ∗ c) · (b ∗ d) by rows of a, c and columns of
        b, d. FedPara, arXiv 2108.06098; LyCORIS.
        """
        del base
        up1, down1 = self._half("1")
        up2, down2 = self._half("2")
        scale = self.alpha / self.rank
        if up1.shape[1] * up2.shape[1] >= min(len(up1), down1.shape[1]):
            return (up1 @ down1) * (up2 @ down2) * scale
        up = torch.einsum("mi,mj->mij", up1, up2).flatten(1) * scale
        return Factors(up=up, down=torch.einsum("in,jn->ijn", down1, down2).flatten(0, 1))

    def _half(self, which: str) -> tuple[Tensor, Tensor]:
        a, b = (self.parts[f"hada_w{which}_{side}"].double() for side in "ab")
        core = self.parts.get(f"hada_t{which}")
        if core is None:
            return a, b.flatten(1)
        return a.T, torch.einsum("mn...,ni->mi...", core.double(), b).flatten(1)

    def scaled(self, strength: float, base: Tensor | None = None) -> "Loha":
        """Scale ΔW once: the size goes into alpha, the sign into one factor."""
        del base
        parts = dict(self.parts)
        if strength < 0:
            parts["hada_w1_a"] = -parts["hada_w1_a"]
        return replace(self, parts=parts, alpha=self.alpha * abs(strength))

    def rows(self, start: int, stop: int) -> "Loha":
        """Return the LoHa of some outputs."""
        tucker = "hada_t1" in self.parts
        cut = {
            role: self.parts[role][:, start:stop] if tucker else self.parts[role][start:stop]
            for role in ("hada_w1_a", "hada_w2_a")
        }
        return replace(self, parts={**self.parts, **cut})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        return {**self.parts, "alpha": alpha_tensor(self.alpha)}


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Loha:
    """Check a module's tensors and make a `Loha` of them.

    Args:
        tensors: by role.
        alpha: what to take where there is no `alpha` tensor; None for the rank.

    Raises:
        AdapterError: a factor is missing, or shapes do not fit each other.
        NumericsError: a value is not finite.
    """
    first, second, third, fourth = needed(tensors, *PARTS)
    check_values(tensors)
    cores = {role: tensors[role] for role in CORES if role in tensors}
    turned = bool(cores)
    if not _are_matrices(first, second, third, fourth, turned=turned):
        raise AdapterError(f"expected matrices, found {shapes_of(tensors)}")
    outs = [tensor.shape[1 if turned else 0] for tensor in (first, third)]
    ranks = [tensor.shape[0 if turned else 1] for tensor in (first, third)]
    fits = (
        len(cores) in (0, 2)
        and outs[0] == outs[1]
        and second.shape[1:] == fourth.shape[1:]
        and ranks == [second.shape[0], fourth.shape[0]]
        and all(core.shape[:2] == (r, r) for core, r in zip(cores.values(), ranks, strict=False))
        and len({core.shape[2:] for core in cores.values()}) < 2
    )
    if not fits:
        raise AdapterError(f"expected two products of one shape, found {shapes_of(tensors)}")
    sizes = next(iter(cores.values())).shape[2:] if cores else ()
    if "alpha" in tensors:
        alpha = number(tensors["alpha"])
    rank = float(second.shape[0])
    return Loha(
        parts={role: tensors[role] for role in (*PARTS, *cores)},
        kernel=(*map(int, second.shape[1:]), *map(int, sizes)),
        alpha=rank if alpha is None else alpha,
    )


def _are_matrices(*factors: Tensor, turned: bool) -> bool:
    """Tell whether the factors are matrices; `w?_b` may hold its kernel where there is no core."""
    first, second, third, fourth = (factor.ndim for factor in factors)
    least = min(second, fourth)
    return first == third == 2 and least >= 2 and (not turned or second == fourth == 2)
