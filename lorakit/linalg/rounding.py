"""Sums that round to a stored dtype as the exact sum does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**18
_BLOCK_ON_A_DEVICE = 2**24
_BELOW = 2**29 - 1
"""The bits of a float64 that float32 has no room for."""
_EXPONENT = 0x7F800000


def rounded_sum(
    base: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Return base + up @ down, rounded once to `dtype` from its float64 value.

    The sum is made in float64, in blocks of rows that fit the cache. torch takes float64 to a
    narrow dtype by way of float32, two roundings; so the first is to odd, after which the second
    is the right one. A product in fp32 with a bound on its error would be faster, but would leave
    a twentieth of the elements of an fp16 weight in doubt: slower than float64 for all.

    Args:
        base: [m, n], any float dtype, any strides.
        up: [m, r] in fp32 or fp64.
        down: [r, n] in fp32 or fp64.
        dtype: what to round to.
        out: where to put it, contiguous [m, n] of `dtype`; `base` itself will do.

    Cost: a product in float64, and eight passes over a block in the cache.
    """
    if base.device.type == "mps":
        # MPS has no fp64.
        return rounded_sum(base.cpu(), up.cpu(), down.cpu(), dtype).to(base.device)
    left, right = up.double(), down.double()
    return _rounded(base, dtype, out, lambda block, rows: block.addmm_(left[rows], right))


def rounded_add(
    base: Tensor, delta: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Return base + delta, rounded once to `dtype` from its float64 value.

    Args:
        base: [m, n], any float dtype, any strides.
        delta: [m, n].
        dtype: what to round to.
        out: where to put it, contiguous [m, n] of `dtype`; `base` itself will do.
    """
    if base.device.type == "mps":
        return rounded_add(base.cpu(), delta.cpu(), dtype).to(base.device)
    return _rounded(base, dtype, out, lambda block, rows: block.add_(delta[rows]))


def _rounded(
    base: Tensor,
    dtype: torch.dtype,
    out: Tensor | None,
    add: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    result = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    if not result.numel():
        return result
    size = _BLOCK if base.device.type == "cpu" else _BLOCK_ON_A_DEVICE
    step = min(len(base), max(1, size // base.shape[1]))
    scratch = _Scratch.of(step, base.shape[1], base.device)
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        exact = add(scratch.widened(base[rows]), rows)
        if dtype.itemsize > 2:
            result[rows] = exact
        else:
            result[rows] = scratch.odd(exact, subnormals=dtype == torch.bfloat16)
    return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scratch:
    """Room for a block in float64, float32 and integers: fresh pages would cost as much again."""

    wide: Tensor
    near: Tensor
    bits: Tensor

    @classmethod
    def of(cls, rows: int, columns: int, device: torch.device) -> "_Scratch":
        """Make room for [rows, columns]."""
        wide, near, bits = (
            torch.empty(rows, columns, dtype=dtype, device=device)
            for dtype in (torch.float64, torch.float32, torch.int64)
        )
        return cls(wide=wide, near=near, bits=bits)

    def widened(self, block: Tensor) -> Tensor:
        """Return a block in float64; by way of float32, for torch goes element by element else."""
        rows = len(block)
        narrow = block if block.dtype.itemsize > 2 else self.near[:rows].copy_(block)
        return self.wide[:rows].copy_(narrow)

    def odd(self, exact: Tensor, *, subnormals: bool) -> Tensor:
        """Return a block in float32, rounded to odd; `exact` is overwritten.

        The bits that float32 has no room for carry into its last bit unless all of them are 0.

        Args:
            exact: [rows, columns] in float64.
            subnormals: whether those of float32 matter; fp16 has nothing near them.
        """
        rows = len(exact)
        bits, spare = exact.view(torch.int64), self.bits[:rows]
        torch.bitwise_and(bits, _BELOW, out=spare)
        bits |= spare.add_(_BELOW)
        bits &= ~_BELOW
        near = self.near[:rows].copy_(exact)
        if subnormals and int((near.view(torch.int32) & _EXPONENT).min()) == 0:
            return to_odd(exact)
        return near


def to_odd(values: Tensor) -> Tensor:
    """Round float64 to fp32 such that a second rounding, to fewer bits, is the right one.

    What lies between two fp32 numbers goes to the one with an odd last bit, never taken for a tie.

    Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums (2008).
    """
    near = values.float()
    back = near.double()
    inexact = (back != values) & ~values.isnan() & near.isfinite()
    outward = inexact & (back.abs() > values.abs())
    bits = near.view(torch.int32)
    rounded: Tensor = ((bits - outward.int()) | inexact.int()).view(torch.float32)
    return rounded
