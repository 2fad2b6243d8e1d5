"""The dense float64 twins: what lorakit must compute, in the plainest words.

    from tests import reference

Slow, without options and without a line of lorakit, so that they can be read at a glance. Every
check against them is itself checked with `negative_control`.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

Array = np.ndarray


def delta(
    up: Tensor, down: Tensor, alpha: float | None = None, mid: Tensor | None = None
) -> Tensor:
    """Return the ΔW in float64, shaped like the weight: [m, n] or [m, n, kh, kw].

    Args:
        up: [m, r] or [m, r, 1, 1].
        down: [r, n], [r, n, 1, 1] or [r, n, kh, kw].
        alpha: None means the rank.
        mid: Tucker's core, [r, r, kh, kw].
    """
    rank = down.shape[0]
    scale = 1.0 if alpha is None else float(alpha) / rank
    left, right = up.double().flatten(1), down.double()
    if mid is None:
        return scale * (left @ right.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return scale * torch.einsum("mi,ijkl,jn->mnkl", left, mid.double(), right.flatten(1))


def merge(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Return Σ strength · ΔW of dense float64 terms."""
    return torch.stack([strength * term.double() for term, strength in terms]).sum(0)


def apply(base: Tensor, terms: Iterable[tuple[Tensor, float]], dtype: torch.dtype) -> Tensor:
    """Return base + Σ strength · ΔW, rounded once to `dtype`."""
    total = base.double() + merge(terms).reshape(base.shape)
    return round_once(total.numpy(), dtype)


def best_rank(dense: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of at most this rank, in dense's own shape (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(dense.double().flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(dense.shape)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖, 0 where both are zero."""
    distance = float((found.double() - expected.double()).norm())
    size = float(expected.double().norm())
    return distance / size if size else float(distance > 0)


def round_once(values: Array, dtype: torch.dtype) -> Tensor:
    """Return float64 values rounded once, to nearest even, to a torch dtype."""
    with np.errstate(over="ignore"):
        if dtype in (torch.float64, torch.float32, torch.float16):
            name = str(dtype).removeprefix("torch.")
            return torch.from_numpy(np.array(values, np.float64).astype(name))
        return torch.from_numpy(_to_odd(np.array(values, np.float64))).to(dtype)


def _to_odd(values: Array) -> Array:
    # Rounded to odd, float32 keeps enough for any narrower format: the next rounding is exact.
    near = values.astype(np.float32)
    cut = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    bits = cut.view(np.uint32) | (cut != values).astype(np.uint32)
    return np.where(np.isnan(values), near, bits.view(np.float32))


def negative_control(check: Callable[[Tensor], None], answer: Tensor) -> None:
    """Prove that a check can fail: it must refuse 0 · answer and 0.9 · answer."""
    check(answer)
    for factor in (0.0, 0.9):
        with pytest.raises(AssertionError):
            check(answer * factor)
