"""Sums that round to a stored dtype as the exact sum does."""

import torch
from torch import Tensor

_BLOCK = 2**18
_BLOCK_ON_A_DEVICE = 2**24
_AROUND = 2.0**-22
_INTEGERS = {1: torch.int8, 2: torch.int16}


def rounded_sum(
    base: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Return base + up @ down, rounded once to `dtype` from its float64 value.

    The sum is made in float64, in blocks of rows that fit the cache. torch takes float64 to a
    narrow dtype by way of float32, two roundings, which is wrong only where float32 falls on a tie
    of `dtype` or beside one. Rounding is monotone: where s (1 - 2^-22) and s (1 + 2^-22), s in
    float32, round to one number, the float64 value between them does too. The few others, one in
    two thousand, go through `to_odd`. A bound on a product in fp32 would leave a twentieth of the
    elements of an fp16 weight in doubt: slower than float64 for all.

    Args:
        base: [m, n], any float dtype, any strides.
        up: [m, r] in fp32 or fp64.
        down: [r, n] in fp32 or fp64.
        dtype: what to round to.
        out: where to put it, contiguous [m, n] of `dtype`; `base` itself will do.

    Cost: a product in float64, and seven passes over a block in the cache.
    """
    if base.device.type == "mps":
        # MPS has no fp64.
        return rounded_sum(base.cpu(), up.cpu(), down.cpu(), dtype).to(base.device)
    result = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    if not result.numel():
        return result
    size = _BLOCK if base.device.type == "cpu" else _BLOCK_ON_A_DEVICE
    step = max(1, size // base.shape[1])
    right = down.double()
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        block = base[rows].to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        exact = block.addmm_(up[rows].double(), right)
        if dtype.itemsize > 2:
            result[rows] = exact
        else:
            _round_into(result[rows], exact)
    return result


def _round_into(result: Tensor, exact: Tensor) -> None:
    near = exact.float()
    result.copy_(near * (1 + _AROUND))
    # NaN equals NaN here, and 0 differs from -0: bits are compared, several elements at a time.
    inner = near.mul_(1 - _AROUND).to(result.dtype)
    kind = _INTEGERS[result.dtype.itemsize]
    differing = (result.view(kind) ^ inner.view(kind)).view(-1)
    lanes = 8 // kind.itemsize
    even = len(differing) // lanes * lanes
    groups = differing[:even].view(torch.int64).nonzero() * lanes
    groups = groups + torch.arange(lanes, device=groups.device)
    tail = torch.arange(even, len(differing), device=groups.device)
    places = torch.cat([groups.flatten(), tail])
    result.view(-1)[places] = to_odd(exact.view(-1)[places]).to(result.dtype)


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
