"""Sums that round to a stored dtype as the exact sum does, at the speed of fp32."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**18
_GATHER = 2**16
_HALF = 2.0**-24


def rounded_sum(base: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return base + up @ down, rounded once to `dtype` from its float64 value.

    In fp32 the sum s is off by at most t = (r + 4) · 2^-24 · ‖up_i‖ · ‖down_j‖ + 2^-22 · |s|: the
    dot product's bound for any order of its terms, its factors' rounding, the addition, and forming
    s ± t. Rounding is monotone, so where s - t and s + t round to one number the exact sum rounds
    to it too; the few other elements are computed again in float64. The result therefore does not
    depend on the BLAS, the threads or the device. For fp32 and wider all is done in float64.

    Args:
        base: [m, n], any float dtype.
        up: [m, r], fp64 or fp32.
        down: [r, n], fp64 or fp32.
        dtype: what to round to.

    Cost: the fp32 product, a few passes over blocks that fit the cache, 0.5 % of it in float64.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    result = torch.empty(base.shape, dtype=dtype, device=base.device)
    left, right = up.double(), down.double()
    step = max(1, BLOCK // max(1, base.shape[1]))
    if torch.finfo(dtype).bits >= 32:
        for start in range(0, base.shape[0], step):
            rows = slice(start, start + step)
            result[rows] = torch.addmm(base[rows].double(), left[rows], right)
        return result
    narrow = _Narrow(
        left=left, columns=right.T.contiguous(), up=left.float(), down=right.float(), bound=_bound(up, down)
    )
    for start in range(0, base.shape[0], step):
        narrow.add(base, slice(start, start + step), result)
    return result


def _bound(up: Tensor, down: Tensor) -> Tensor:
    """Return the rows' bounds on the error of up @ down in fp32, [m, 1]."""
    rows = torch.linalg.vector_norm(up.double(), dim=1, keepdim=True)
    widest = torch.linalg.vector_norm(down.double(), dim=0).amax()
    bound: Tensor = rows * widest * ((up.shape[1] + 4) * _HALF)
    return bound.float()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Narrow:
    left: Tensor
    columns: Tensor
    up: Tensor
    down: Tensor
    bound: Tensor

    def add(self, base: Tensor, rows: slice, result: Tensor) -> None:
        """Write a block of rows of the rounded sum."""
        block, place = base[rows], result[rows]
        total = torch.addmm(block.float(), self.up[rows], self.down)
        slack = total.abs().mul_(4 * _HALF).add_(self.bound[rows])
        place.copy_(total - slack)
        doubtful = _different(place, total.add_(slack).to(result.dtype))
        for first in range(0, len(doubtful), _GATHER):
            flat = doubtful[first : first + _GATHER]
            i, j = flat // base.shape[1], flat % base.shape[1]
            products = self.left[rows][i] * self.columns[j]
            exact = block[i, j].double() + products.sum(dim=1)
            place[i, j] = to_odd(exact).to(result.dtype)


def _different(first: Tensor, second: Tensor) -> Tensor:
    """Return where the bits of two half-precision tensors differ, as flat places."""
    one, other = (tensor.view(torch.int16).reshape(-1) for tensor in (first, second))
    if one.device.type != "cpu":
        return torch.nonzero(one != other).reshape(-1)
    # NumPy compares and counts ten times as fast as torch on one thread.
    return torch.from_numpy(np.flatnonzero(one.numpy() != other.numpy()))


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
    return ((bits - outward.int()) | inexact.int()).view(torch.float32)
