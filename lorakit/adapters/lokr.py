"""LoKr: ΔW = scale · kron(w1, w2), each whole or a product of two, w2 perhaps with a core."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters.checks import alpha_tensor, check_values, number, shapes_of
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors

WHOLE = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lokr:
    """The Kronecker product of a small matrix and a larger one.

    Args:
        parts: `lokr_w1` [a, c], or `lokr_w1_a` [a, rank] and `lokr_w1_b` [rank, c]; `lokr_w2`
            [b, d] or [b, d, kh, kw], or `lokr_w2_a` [b, rank] and `lokr_w2_b` [rank, d · kh · kw],
            with a core `lokr_t2` [rank, rank, kh, kw] `lokr_w2_a` [rank, b]. Outputs are a · b,
            inputs c · d.
        alpha: the stored one; ΔW = alpha / rank · kron(w1, w2), where both are whole it says
            nothing.
    """

    parts: Mapping[str, Tensor]
    alpha: float

    @property
    def kind(self) -> str:
        """'lokr'."""
        return "lokr"

    @property
    def rank(self) -> int | None:
        """The rank of what is factored; None where both are whole."""
        for role in ("lokr_w2_b", "lokr_w1_b"):
            if role in self.parts:
                return int(self.parts[role].shape[0])
        return None

    @property
    def scale(self) -> float:
        """Alpha / rank; 1 where both are whole, for alpha is then only a trainer's setting.

        Source: LyCORIS; PEFT scales by its configuration always.
        """
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def needs_base(self) -> bool:
        """False: ΔW is the same on every base."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in) or (out, in, kh, kw)."""
        (a, c, *_), (b, d, *kernel) = self._sizes("1"), self._sizes("2")
        return (a * b, c * d, *kernel)

    def _sizes(self, which: str) -> tuple[int, ...]:
        whole = self.parts.get(f"lokr_w{which}")
        if whole is not None:
            return tuple(map(int, whole.shape))
        a, b = (self.parts[f"lokr_w{which}_{side}"] for side in "ab")
        core = self.parts.get(f"lokr_t{which}")
        if core is None:
            return (int(a.shape[0]), int(b.shape[1]))
        return (int(a.shape[1]), int(b.shape[1]), *map(int, core.shape[2:]))

    def change(self, base: Tensor | None = None) -> Factors | Tensor:
        """Return ΔW: factors where a part is one, by kron(w1, a·b) = kron(w1, a) · kron(I, b).

        Source: LoKr, arXiv 2309.14859; LyCORIS.
        """
        del base
        (up1, down1), (up2, down2) = self._half("1"), self._half("2")
        rank = up1.shape[1] * up2.shape[1]
        rows, columns = len(up1) * len(up2), down1.shape[1] * down2.shape[1]
        if rank >= min(rows, columns):
            return _kron(up1 @ down1, up2 @ down2) * self.scale
        return Factors(up=_kron(up1, up2) * self.scale, down=_kron(down1, down2))

    def _half(self, which: str) -> tuple[Tensor, Tensor]:
        """Return one matrix, the kernel flat, as a product with a small inner side."""
        whole = self.parts.get(f"lokr_w{which}")
        if whole is not None:
            flat = whole.double().flatten(1)
            one = torch.eye(min(flat.shape), dtype=flat.dtype, device=flat.device)
            return (one, flat) if flat.shape[0] <= flat.shape[1] else (flat, one)
        a, b = (self.parts[f"lokr_w{which}_{side}"].double() for side in "ab")
        core = self.parts.get(f"lokr_t{which}")
        if core is not None:
            return a.T, torch.einsum("mn...,ni->mi...", core.double(), b).flatten(1)
        return a, b.flatten(1)

    def scaled(self, strength: float, base: Tensor | None = None) -> "Lokr":
        """Scale ΔW once: alpha, its sign a factor; w1 itself, in fp32, where both are whole."""
        del base
        parts = dict(self.parts)
        first = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
        if self.rank is None:
            parts[first] = parts[first].float() * strength
            return replace(self, parts=parts)
        if strength < 0:
            parts[first] = -parts[first]
        return replace(self, parts=parts, alpha=self.alpha * abs(strength))

    def rows(self, start: int, stop: int) -> "Lokr":
        """Return the LoKr of some outputs, where the cuts fall between the rows of w1."""
        step = self._sizes("2")[0]
        if start % step or stop % step:
            raise AdapterError(
                f"is LoKr in blocks of {step} outputs, found a cut at {start} and {stop}; make a "
                "plain LoRA of it with convert --as lora"
            )
        rows = slice(start // step, stop // step)
        first = "lokr_w1" if "lokr_w1" in self.parts else "lokr_w1_a"
        return replace(self, parts={**self.parts, first: self.parts[first][rows]})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        return {**self.parts, "alpha": alpha_tensor(self.alpha)}


def _kron(a: Tensor, b: Tensor) -> Tensor:
    # torch.kron fails on factors whose strides are unusual, as those of a turned [1, b] are.
    rows, columns = len(a) * len(b), a.shape[1] * b.shape[1]
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(rows, columns)


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Lokr:
    """Check a module's tensors and make a `Lokr` of them.

    Args:
        tensors: by role; `lokr_t1`, which LyCORIS never uses, is refused.
        alpha: what to take where there is no `alpha` tensor; None for the rank.

    Raises:
        AdapterError: a factor is missing, or shapes do not fit each other.
        NumericsError: a value is not finite.
    """
    check_values(tensors)
    parts = {role: tensor for role, tensor in tensors.items() if role.startswith("lokr_")}
    for which in "12":
        pair = {f"lokr_w{which}_a", f"lokr_w{which}_b"} & parts.keys()
        whole = f"lokr_w{which}" in parts
        if whole == bool(pair) or len(pair) == 1 or "lokr_t1" in parts:
            raise AdapterError(
                f"expected lokr_w{which}, or lokr_w{which}_a and lokr_w{which}_b, found "
                f"{shapes_of(tensors)}"
            )
    if not _fits(parts):
        raise AdapterError(f"expected factors that fit each other, found {shapes_of(tensors)}")
    found = Lokr(parts=parts, alpha=1.0)
    if "alpha" in tensors:
        alpha = number(tensors["alpha"])
    return replace(found, alpha=float(found.rank or 1) if alpha is None else alpha)


def _fits(parts: Mapping[str, Tensor]) -> bool:
    for which in "12":
        a, b = (parts.get(f"lokr_w{which}_{side}") for side in "ab")
        core = parts.get(f"lokr_t{which}")
        if a is None or b is None:
            if core is not None or parts[f"lokr_w{which}"].ndim < 2:
                return False
        elif a.ndim != 2 or b.ndim != 2:
            return False
        elif core is not None:
            if core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0]):
                return False
        elif a.shape[1] != b.shape[0]:
            return False
    return math.prod(parts["lokr_w1"].shape[2:]) == 1 if "lokr_w1" in parts else True
