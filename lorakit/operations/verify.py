"""--verify: read the output back and compare it with what it should hold."""

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch

from lorakit.adapters import Adapter
from lorakit.compute import Compute, ordered_map
from lorakit.errors import NumericsError
from lorakit.fusing import fused, parts_of, split
from lorakit.linalg.factored import Factors, dense, distance
from lorakit.linalg.tiles import size
from lorakit.lorafile import LoraFile, load_lora
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import whole
from lorakit.progress import Progress, silent
from lorakit.report import Report, Verified
from lorakit.tensorfile.source import torch_dtype

ARITHMETIC = 1e-5
"""What fp32 factors and sums may differ by, relative; an exact command stays far below."""


def verify_lora(
    path: Path,
    pieces: Sequence[Piece],
    report: Report,
    *,
    compute: Compute,
    progress: Progress = silent,
) -> Verified:
    """Compare a written LoRA with the exact ΔW of every layer, recomputed from the inputs.

    Args:
        path: the file that was written.
        pieces: the exact ΔW, as the command took them.
        report: the command's report: the error that the rank rule made in each layer.
        compute: workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        NumericsError: a layer is further off than the rank rule and the dtype's rounding explain.
    """
    expected = {row.module: row.error or 0.0 for row in report.rows if row.rank_after != 0}
    written = _named_as(load_lora(path), expected.keys())
    tolerance = rounding_tolerance(written.dtype)
    chosen = [piece for piece in pieces if piece.module in expected]
    missing = [piece.module for piece in chosen if piece.module not in written.adapters]
    unread = expected.keys() - {piece.module for piece in chosen}
    missing += [m for m in sorted(unread) if m in written.adapters and not _unknowable(written, m)]
    if missing or len(written.adapters) != len(expected):
        raise NumericsError(
            f"{path}: expected {len(expected)} layers, found {len(written.adapters)} after "
            "writing; the file was changed by someone else, write it again."
        )
    errors: dict[str, float] = {}
    measured = ordered_map(
        lambda piece: _error(piece, written.adapters[piece.module]),
        chosen,
        compute=compute,
        cost=lambda piece: 2 * piece.cost,
    )
    for done, (piece, error) in enumerate(zip(chosen, measured, strict=True), start=1):
        errors[piece.module] = error
        progress("verified", done, len(chosen))
    return _summary(path, errors, expected, tolerance)


def _named_as(written: LoraFile, modules: Set[str]) -> LoraFile:
    """Return a LoRA with the layers that were merged: its dialect may have cut or joined them."""
    missing = modules - written.adapters.keys()
    if any(parts_of(written, module) for module in missing):
        return fused(written)
    return split(written) if missing else written


def _unknowable(lora: LoraFile, module: str) -> bool:
    """Tell whether a layer's change depends on a model that the command was not given."""
    return lora.adapters[module].needs_base


def rounding_tolerance(dtype: str) -> float:
    """Return how far rounding two factors to `dtype` may move their product, relative.

    Each factor's elements move by at most half a unit in the last place, eps / 2 relative, so the
    product moves by eps at the most and less on average; the rest is room for subnormals.
    """
    eps = float(torch.finfo(torch_dtype(dtype)).eps)
    return 2 * eps + ARITHMETIC


def _error(piece: Piece, adapter: Adapter) -> float:
    base = piece.base() if adapter.needs_base and piece.base else None
    truth, found = whole(piece.truth()), adapter.change(base)
    if isinstance(truth, Factors) and isinstance(found, Factors):
        return distance(truth, found)
    left = dense(truth) if isinstance(truth, Factors) else truth
    norm = size(left)
    if isinstance(found, Factors):
        left = left.addmm(found.up.to(left), found.down.to(left), alpha=-1.0)
    else:
        left = left - found.to(left).reshape(left.shape)
    return size(left) / norm if norm else 0.0


def _summary(
    path: Path, errors: Mapping[str, float], expected: Mapping[str, float], tolerance: float
) -> Verified:
    beyond = {
        module: math.sqrt(max(0.0, error**2 - expected[module] ** 2))
        if error > expected[module] * (1 + 1e-3)
        else 0.0
        for module, error in errors.items()
    }
    if not errors:
        return Verified(
            layers=0, largest=0.0, mean=0.0, worst="", rounding=0.0, tolerance=tolerance
        )
    worst = max(errors, key=lambda module: errors[module])
    off = max(beyond, key=lambda module: beyond[module])
    if beyond[off] > tolerance or math.isnan(errors[worst]):
        raise NumericsError(
            f"{path}: {off} differs from the exact result by {errors[off]:.2e} relative, expected "
            f"at most {math.hypot(expected[off], tolerance):.2e}; write with --dtype fp32."
        )
    return Verified(
        layers=len(errors),
        largest=errors[worst],
        mean=math.fsum(errors.values()) / len(errors),
        worst=worst,
        rounding=beyond[off],
        tolerance=tolerance,
    )
