"""Sums that round to a stored dtype as the exact sum does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.linalg.tiles import Place, Tiled, places, sides_of

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
    return _rounded(base, dtype, out, lambda block, at: block.addmm_(left[at[0]], right[:, at[1]]))


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
    return _rounded(base, dtype, out, lambda block, at: block.add_(delta[at]))


def rounded_tiles(
    base: Tensor, delta: Tiled, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Return base + delta, rounded once to `dtype` from its float64 value, a tile at a time.

    Args:
        base: [m, n], any float dtype, any strides.
        delta: [m, n], whose tiles are the ones that are summed.
        dtype: what to round to.
        out: where to put it, contiguous [m, n] of `dtype`; `base` itself will do.
    """
    if base.device.type == "mps":
        return rounded_tiles(base.cpu(), delta, dtype).to(base.device)
    return _rounded(
        base,
        dtype,
        out,
        lambda block, at: block.add_(delta.tile(at).to(block.device)),
        delta.sides,
    )


def _rounded(
    base: Tensor,
    dtype: torch.dtype,
    out: Tensor | None,
    add: Callable[[Tensor, Place], Tensor],
    sides: tuple[int, int] | None = None,
) -> Tensor:
    result = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    if not result.numel():
        return result
    sides = sides or _sides(base)
    scratch = _Scratch.of(*sides, base.device)
    for at in places((base.shape[0], base.shape[1]), sides):
        exact = add(scratch.widened(base[at]), at)
        if dtype.itemsize > 2:
            result[at] = exact
        else:
            result[at] = scratch.odd(exact, subnormals=dtype == torch.bfloat16)
    return result


def _sides(base: Tensor) -> tuple[int, int]:
    rows, columns = base.shape
    if base.device.type != "cpu":
        return min(rows, max(1, _BLOCK_ON_A_DEVICE // columns)), columns
    return sides_of((rows, columns))


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
        rows, columns = block.shape
        narrow = block if block.dtype.itemsize > 2 else self.near[:rows, :columns].copy_(block)
        return self.wide[:rows, :columns].copy_(narrow)

    def odd(self, exact: Tensor, *, subnormals: bool) -> Tensor:
        """Return a block in float32, rounded to odd; `exact` is overwritten.

        The bits that float32 has no room for carry into its last bit unless all of them are 0.

        Args:
            exact: [rows, columns] in float64.
            subnormals: whether those of float32 matter; fp16 has nothing near them.
        """
        rows, columns = exact.shape
        bits, spare = exact.view(torch.int64), self.bits[:rows, :columns]
        torch.bitwise_and(bits, _BELOW, out=spare)
        bits |= spare.add_(_BELOW)
        bits &= ~_BELOW
        near = self.near[:rows, :columns].copy_(exact)
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
