"""--verify for checkpoints: touched tensors are the sum rounded once, the others the same."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import NumericsError
from lorakit.linalg.factored import Factors
from lorakit.models import Addend, Applied
from lorakit.operations.stack import whole
from lorakit.progress import Progress, silent
from lorakit.report import Verified
from lorakit.tensorfile.quantised import Dequantised, dequantised
from lorakit.tensorfile.source import TensorSource, open_source, torch_dtype

BLOCK_ELEMENTS = 2**21


def verify_model(
    path: Path, applied: Applied, *, compute: Compute, progress: Progress = silent
) -> Verified:
    """Compare a written checkpoint with base + ΔW in float64, and the rest byte for byte.

    `largest` and `mean` are ‖stored − base − ΔW‖ / ‖ΔW‖: how much of the change the stored dtype
    rounds away; `rounding` is the largest distance from the exact sum in units in the last place.

    Raises:
        NumericsError: a tensor is further off than one rounding, or an untouched one differs.
    """
    written = dequantised(open_source(path))
    keys = list(applied.specs)
    if list(written.specs) != keys and set(written.specs) != set(keys):
        raise NumericsError(
            f"{path}: expected the {len(keys)} tensors of {applied.name}, found "
            f"{len(written.specs)} after writing; write it again."
        )
    checks = ordered_map(
        lambda key: _check(written, applied, key),
        keys,
        compute=compute,
        cost=lambda key: (
            24 * min(applied.specs[key].numel, 4 * BLOCK_ELEMENTS) + 8 * applied.specs[key].numel
        ),
    )
    errors: dict[str, float] = {}
    steps = 0.0
    for done, (key, check) in enumerate(zip(keys, checks, strict=True), start=1):
        if key in applied.addends:
            errors[key], ulps = check
            steps = max(steps, ulps)
            if not ulps <= 0.5 * (1 + 1e-6):
                raise NumericsError(
                    f"{path}: {key} is {ulps:.3f} units in the last place from the exact sum, "
                    "expected 0.5 at most; write it again."
                )
        elif check[0]:
            raise NumericsError(
                f"{path}: {key} should be untouched, found other bytes; write again."
            )
        progress("verified", done, len(keys))
    worst = max(errors, key=lambda key: errors[key])
    return Verified(
        layers=len(errors),
        largest=errors[worst],
        mean=math.fsum(errors.values()) / len(errors),
        worst=worst,
        rounding=steps,
        tolerance=0.5,
        untouched=len(keys) - len(errors),
    )


def _check(written: TensorSource, applied: Applied, key: str) -> tuple[float, float]:
    stored, base = written.get(key), applied.base.get(key)
    if key not in applied.addends:
        same = written.specs[key].dtype == applied.specs[key].dtype
        return float(same and not _same_bytes(stored, base)), 0.0
    off = change = 0.0
    steps = [0.0]
    dtype, scale = stored.dtype, torch.ones(1, dtype=torch.float64)
    if isinstance(written, Dequantised) and key in written.scales:
        # What `get` returns is rounded to fp32: too coarse to measure half a step by.
        dtype, scale = torch_dtype(written.specs[key].dtype), written.scale(key)
        stored = written.base.get(key).double() * scale
    height = stored.shape[1] if applied.addends[key][0].transpose else len(stored)
    scales = scale.reshape(-1, 1).expand(height, 1)
    for rows, part, value, delta in _blocks(stored, base, applied.addends[key]):
        exact = value + delta
        error = (part.double() - exact).abs_()
        off += float(error.square().sum())
        change += float(delta.square().sum())
        unit = scales[rows] * _unit(exact / scales[rows], dtype)
        steps.append(float((error / unit).max()))
    # Python's own maximum passes over NaN.
    largest = float(torch.tensor(steps, dtype=torch.float64).max())
    return math.sqrt(off / change) if change else 0.0, largest


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    views = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*views)


def _blocks(
    stored: Tensor, base: Tensor, addends: tuple[Addend, ...]
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (rows, stored, base, ΔW) in float64 by row blocks, rows that no ΔW touches too."""
    side = addends[0].transpose
    stored, base = (t.T if side else t for t in (stored, base))
    width = math.prod(base.shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    made = [(addend.rows, whole(addend.on(base.T if side else base))) for addend in addends]
    for first in range(0, base.shape[0], step):
        last = min(first + step, base.shape[0])
        delta = torch.zeros(last - first, width, dtype=torch.float64)
        for (start, stop), change in made:
            low, high = max(first, start), min(last, stop)
            if low < high:
                inside = slice(low - start, high - start)
                delta[low - first : high - first] += _some(change, inside)
        rows = slice(first, last)
        yield (
            rows,
            stored[rows].reshape(last - first, width),
            base[rows].reshape(last - first, width).double(),
            delta,
        )


def _some(change: Factors | Tensor, rows: slice) -> Tensor:
    if isinstance(change, Tensor):
        return change[rows].double().reshape(rows.stop - rows.start, -1)
    return change.up[rows].double() @ change.down.double()


def _unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbours in `dtype` around each value of `exact`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact)[1] - 1
    lowest = int(math.log2(info.smallest_normal))
    return torch.ldexp(torch.full_like(exact, info.eps), exponent.clamp_min(lowest))
