"""LoRA and LoCon: ΔW = alpha / rank · up · down, with a Tucker core where there is a `mid`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters.checks import alpha_tensor, check_values, number
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors, double

ROLES = ("up", "down", "mid", "alpha")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lora:
    """A low-rank ΔW of a linear layer or of a convolution.

    Args:
        up: [out, rank] or [out, rank, 1, 1].
        down: [rank, in] or [rank, in, kh, kw]; [rank, in, 1, 1] beside a `mid`.
        mid: None, or the Tucker core [rank, rank, kh, kw].
        alpha: ΔW = alpha / rank · up · down.
        has_alpha: whether the file says alpha, or leaves it to be the rank.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None = None
    alpha: float
    has_alpha: bool = True

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW: (out, in) or (out, in, kh, kw)."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (int(self.up.shape[0]), int(self.down.shape[1]), *map(int, kernel))

    @property
    def kind(self) -> str:
        """'lora', or 'locon' for kernels over 1x1."""
        return "locon" if math.prod(self.shape[2:]) > 1 else "lora"

    @property
    def needs_base(self) -> bool:
        """False: ΔW is the same on every base."""
        return False

    def change(self, base: Tensor | None = None) -> Factors:
        """Return ΔW as fp64 factors [out, rank] and [rank, in · kh · kw], the scale folded in."""
        del base
        up, down = double(self.up.flatten(1)), double(self.down.flatten(1))
        if self.scale != 1.0:
            # In place where it is a copy: fresh memory costs as much as the product.
            up = up * self.scale if self.up.dtype == torch.float64 else up.mul_(self.scale)
        if self.mid is not None:
            down = torch.einsum("mn...,ni->mi...", self.mid.double(), down).flatten(1)
        return Factors(up=up, down=down)

    @property
    def narrow(self) -> bool:
        """Whether ΔW is a product of two factors of 16 bits: fp32 holds each of its terms."""
        return self.mid is None and max(t.dtype.itemsize for t in (self.up, self.down)) <= 2

    def scaled(self, strength: float, base: Tensor | None = None) -> "Lora":
        """Scale ΔW once and exactly: the size goes into alpha, the sign into `up`.

        A negative alpha would be as exact, but some loaders split it by powers of two for ever.
        """
        del base
        up = -self.up if strength < 0 else self.up
        return replace(self, up=up, alpha=self.alpha * abs(strength))

    def rows(self, start: int, stop: int) -> "Lora":
        """Return the LoRA of some outputs, without the directions that do not reach them.

        A file that was trained on q, k and v apart and stored fused has most of its `up` zero.
        """
        up = self.up[start:stop]
        if self.mid is not None or up.device.type == "meta":
            return replace(self, up=up)
        live = up.flatten(1).count_nonzero(dim=0).nonzero().flatten()
        if len(live) == self.rank or not len(live):
            return replace(self, up=up)
        return Lora(up=up[:, live], down=self.down[live], alpha=self.scale * len(live))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role, alpha as a scalar in fp32 (bf16 does not hold 301)."""
        tensors = {"up": self.up, "down": self.down, "alpha": alpha_tensor(self.alpha)}
        return tensors if self.mid is None else tensors | {"mid": self.mid}


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Lora:
    """Check a module's tensors and make a `Lora` of them.

    Args:
        tensors: by role: `up`, `down`, perhaps `mid`, `alpha`, or the web UI's `scale`;
            `embedding_up` and `embedding_down` are PEFT's of an embedding, which is transposed.
        alpha: what to take where there is no `alpha` tensor; None for the rank.

    Raises:
        AdapterError: a factor is missing, or shapes do not fit each other.
        NumericsError: a value is not finite.
    """
    if "embedding_down" in tensors and "embedding_up" in tensors:
        tensors = {
            "up": tensors["embedding_down"].T.contiguous(),
            "down": tensors["embedding_up"].T.contiguous(),
        }
    missing = [role for role in ("up", "down") if role not in tensors]
    if missing:
        raise AdapterError(
            f"has no lora_{missing[0]} beside its {', '.join(sorted(tensors))}; "
            "the file is incomplete, get it again from where it was made"
        )
    up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
    _check_shapes(up, down, mid)
    check_values(tensors)
    rank = float(down.shape[0])
    if "scale" in tensors:
        alpha = number(tensors["scale"]) * rank
    elif "alpha" in tensors:
        alpha = number(tensors["alpha"])
    said = alpha is not None
    return Lora(up=up, down=down, mid=mid, alpha=rank if alpha is None else alpha, has_alpha=said)


def from_factors(change: Factors, shape: tuple[int, ...]) -> Lora:
    """Return factors [out, rank] and [rank, in · kh · kw] as a LoRA of scale 1 in fp32."""
    return Lora(
        up=change.up.float().reshape(*change.up.shape, *(1 for _ in shape[2:])),
        down=change.down.float().reshape(-1, *shape[1:]),
        alpha=float(change.rank),
    )


def _check_shapes(up: Tensor, down: Tensor, mid: Tensor | None) -> None:
    shapes = f"up {list(up.shape)} and down {list(down.shape)}"
    if up.ndim < 2 or down.ndim < 2 or 0 in up.shape or 0 in down.shape:
        raise AdapterError(f"expected matrices or kernels, found {shapes}")
    if math.prod(up.shape[2:]) != 1:
        raise AdapterError(f"expected a 1x1 kernel in lora_up, found {shapes}")
    if mid is None:
        if up.shape[1] != down.shape[0]:
            raise AdapterError(f"expected one rank in both factors, found {shapes}")
        return
    fits = mid.ndim > 2 and mid.shape[0] == up.shape[1] and mid.shape[1] == down.shape[0]
    if not fits or math.prod(down.shape[2:]) != 1:
        raise AdapterError(f"expected a Tucker core that fits {shapes}, found {list(mid.shape)}")
