"""Sums that round to fp8 as the exact sum does, and how much of a change survives that."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.errors import NumericsError

_BLOCK = 2**18
_BLOCK_ON_A_DEVICE = 2**24
_BELOW = 2**29 - 1
"""The bits of a float64 that float32 has no room for."""
_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
# Half a step above the largest number. There ties go to even: down to 448, but up from 57344.
_FIRST_TOO_LARGE = {torch.float8_e4m3fn: 464.0 * (1 + 2.0**-52), torch.float8_e5m2: 61440.0}


def rounded_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest fp8 number, ties to even; what is larger becomes the largest one.

    Args:
        values: any shape, any float dtype; float64 is rounded once, not by way of float32.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Returns:
        A tensor of the same shape in `dtype`; NaN stays, infinity becomes the largest number.
    """
    top = torch.finfo(dtype).max
    flat = values.reshape(-1)
    result = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    size = _block(flat.device)
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        near = _odd(part) if part.dtype == torch.float64 else part.float()
        # A cast of torch may or may not saturate, as the version and the dtype will have it.
        result[start : start + size] = near.clamp(-top, top).to(dtype)
    return result.reshape(values.shape)


def widened_fp8(values: Tensor) -> Tensor:
    """Return fp8 values in fp32, as `float()` does at several times the cost.

    Args:
        values: any shape, `torch.float8_e4m3fn` or `torch.float8_e5m2`, on any device.
    """
    flat = values.contiguous().view(torch.uint8).reshape(-1)
    result = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    size = _block(flat.device)
    for start in range(0, len(flat), size):
        bits = flat[start : start + size].short()
        part = result[start : start + size]
        if values.dtype == torch.float8_e5m2:
            part.copy_((bits << 8).view(torch.float16))
            continue
        # Under fp16's exponent, whose bias is 8 more; and 480 is what NaN looks like there.
        half = (bits & 0x80) << 8 | (bits & 0x7F) << 7
        part.copy_(half.view(torch.float16)).mul_(256.0)
        low, high = torch.aminmax(part)
        # Seldom needed, and slower than all the rest.
        if max(-float(low), float(high)) == 480.0:
            part.masked_fill_(part.abs() == 480.0, float("nan"))
    return result.reshape(values.shape)


def rounded8_sum(base: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return base + up @ down, rounded once to fp8 from its float64 value.

    Args:
        base: [m, n], any float dtype, any strides.
        up: [m, r] in fp32 or fp64.
        down: [r, n] in fp32 or fp64.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Raises:
        NumericsError: a finite sum does not fit; the sentence lacks the name of the layer.

    Cost: a product in float64, and ten passes over a block in the cache.
    """
    if base.device.type == "mps":
        # MPS has neither fp64 nor fp8.
        return rounded8_sum(base.cpu(), up.cpu(), down.cpu(), dtype)
    left, right = up.double(), down.double()
    return _rounded(base, dtype, lambda block, rows: block.addmm_(left[rows], right))


def rounded8_add(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return base + delta, rounded once to fp8 from its float64 value.

    Args:
        base: [m, n], any float dtype, any strides.
        delta: [m, n].
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Raises:
        NumericsError: a finite sum does not fit; the sentence lacks the name of the layer.
    """
    if base.device.type == "mps":
        return rounded8_add(base.cpu(), delta.cpu(), dtype)
    return _rounded(base, dtype, lambda block, rows: block.add_(delta[rows]))


def surviving(change: Tensor, stored: Tensor, base: Tensor) -> float:
    """Return the share of ΔW that a rounding leaves: 1 − ‖stored − (base + ΔW)‖ / ‖ΔW‖.

    Args:
        change: ΔW, [m, n].
        stored: [m, n], the rounded sum as it is used: with its scale.
        base: [m, n], what ΔW was added to.

    Returns:
        1 where nothing is lost or there is no change, 0 where the error is as large as ΔW.
    """
    off = norm = 0.0
    step = max(1, _block(change.device) // max(1, change.shape[1]))
    for start in range(0, len(change), step):
        rows = slice(start, start + step)
        delta = change[rows].double()
        error = stored[rows].double() - base[rows].double() - delta
        off += float(error.square().sum())
        norm += float(delta.square().sum())
    return max(0.0, 1.0 - (off / norm) ** 0.5) if norm else 1.0


def _rounded(base: Tensor, dtype: torch.dtype, add: Callable[[Tensor, slice], Tensor]) -> Tensor:
    result = torch.empty(base.shape, dtype=dtype, device=base.device)
    if not result.numel():
        return result
    step = max(1, _block(base.device) // base.shape[1])
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        exact = add(_wide(base[rows]).to(torch.float64, copy=True), rows)
        result[rows] = _checked(exact, dtype)
    return result


def _checked(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a block whose finite values must fit; the others stay what they are."""
    low, high = torch.aminmax(exact)
    largest = max(-float(low), float(high))
    if largest < _FIRST_TOO_LARGE[dtype]:
        return rounded_fp8(exact, dtype)
    largest = float(exact.abs().nan_to_num(0.0, 0.0, 0.0).max())
    if largest >= _FIRST_TOO_LARGE[dtype]:
        raise NumericsError(
            f"the largest value {largest:.6g} overflows {_NAMES[dtype]}; use --dtype fp32 or bf16."
        )
    odd = exact.float()
    if dtype == torch.float8_e4m3fn:
        # It has no infinity, and the largest number would hide that there was one.
        odd = odd * float("nan")
    return torch.where(exact.isfinite(), rounded_fp8(exact, dtype).float(), odd).to(dtype)


def _wide(block: Tensor) -> Tensor:
    """Return a block in fp32 at least, exactly: torch takes fp16 to float64 one by one."""
    if block.dtype in _NAMES:
        return widened_fp8(block)
    return block.float() if block.dtype.itemsize < 4 else block


def _odd(exact: Tensor) -> Tensor:
    """Return float64 in float32, rounded to odd; what is too small for fp8 may become 0.

    The bits that float32 has no room for carry into its last bit unless all of them are 0; so a
    second rounding is the right one, as with `to_odd`, which costs five times as much.
    """
    bits = exact.view(torch.int64)
    bits = (bits & _BELOW).add_(_BELOW).bitwise_or_(bits).bitwise_and_(~_BELOW)
    return bits.view(torch.float64).float()


def _block(device: torch.device) -> int:
    return _BLOCK if device.type == "cpu" else _BLOCK_ON_A_DEVICE
