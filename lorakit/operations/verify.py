"""--verify: read the output back and compare it with what it should hold."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.adapters import Adapter
from lorakit.compute import Compute, ordered_map
from lorakit.errors import NumericsError
from lorakit.fusing import fused, parts_of, split
from lorakit.linalg.factored import Factors, dense, distance, inner, norm
from lorakit.linalg.tiles import size
from lorakit.lorafile import LoraFile, load_lora
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import whole
from lorakit.peftfolder import open_peft
from lorakit.progress import Progress, silent
from lorakit.report import Report, Verified
from lorakit.tensorfile.claims import check_claims
from lorakit.tensorfile.source import TensorSource, open_source, torch_dtype

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
        NumericsError: a layer is further off than the rank rule and the dtype's rounding explain,
            or the file has not the bytes whose hash was taken before they were written.
    """
    _check_bytes(path)
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
    found: dict[str, _Distance] = {}
    measured = ordered_map(
        lambda piece: _distance(piece, written.adapters[piece.module]),
        chosen,
        compute=compute,
        cost=lambda piece: 2 * piece.cost,
    )
    for done, (piece, measure) in enumerate(zip(chosen, measured, strict=True), start=1):
        found[piece.module] = measure
        progress("verified", done, len(chosen))
    return _summary(path, found, expected, tolerance)


def _check_bytes(path: Path) -> None:
    source = open_peft(path)[0] if path.is_dir() else open_source(path)
    parts: Mapping[str, TensorSource] = getattr(source, "parts", None) or {"": source}
    wrong = [
        claim.key for part in parts.values() for claim in check_claims(part) if not claim.right
    ]
    if wrong:
        raise NumericsError(
            f"{path}: expected the bytes that were written, found others, {wrong[0]} differs; "
            "someone else changed the file or the disk is failing, write it again."
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Distance:
    """How far a stored layer is from the exact ΔW.

    Args:
        error: ‖ΔW − stored‖ / ‖ΔW‖.
        along: |⟨ΔW − stored, stored⟩| / (‖ΔW‖ ‖stored‖). What a rank rule cuts is orthogonal to
            what it keeps, so this is rounding alone, also where the error is mostly the cut.
    """

    error: float
    along: float


def _distance(piece: Piece, adapter: Adapter) -> _Distance:
    base = piece.base() if adapter.needs_base and piece.base else None
    truth, found = whole(piece.truth()), adapter.change(base)
    if isinstance(truth, Factors) and isinstance(found, Factors):
        norms = norm(truth), norm(found)
        off, along = distance(truth, found), inner(truth, found) - norms[1] ** 2
        return _Distance(error=off, along=_share(abs(along), norms))
    left = dense(truth) if isinstance(truth, Factors) else truth
    whole_norm = size(left)
    if not isinstance(found, Factors):
        off = size(left - found.to(left).reshape(left.shape))
        return _Distance(error=_share(off, (whole_norm, 1.0)), along=0.0)
    up, down = found.up.to(left), found.down.to(left)
    left = left.addmm(up, down, alpha=-1.0)
    along = float(((up.T @ left) * down).sum(dtype=torch.float64))
    return _Distance(
        error=_share(size(left), (whole_norm, 1.0)),
        along=_share(abs(along), (whole_norm, norm(found))),
    )


def _share(off: float, norms: tuple[float, float]) -> float:
    whole_norm = norms[0] * norms[1]
    return off / whole_norm if whole_norm else math.inf if off else 0.0


def _summary(
    path: Path, found: Mapping[str, _Distance], expected: Mapping[str, float], tolerance: float
) -> Verified:
    errors = {module: distance.error for module, distance in found.items()}
    beyond = {module: _beyond(found[module], expected[module]) for module in found}
    if not errors:
        return Verified(
            layers=0, largest=0.0, mean=0.0, worst="", rounding=0.0, tolerance=tolerance
        )
    worst = max(errors, key=lambda module: errors[module])
    off = max(beyond, key=lambda module: beyond[module])
    if not beyond[off] <= tolerance:
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


def _beyond(found: _Distance, expected: float) -> float:
    """Return the part of a distance that the rank rule does not explain."""
    if math.isnan(found.error):
        return math.inf
    # The report's error is of the singular values, in another rounding.
    cut = expected * (1 + 1e-3)
    rest = math.sqrt(found.error**2 - expected**2) if found.error > cut else 0.0
    # Rounding turns the kept part by its own size and by that of the cut: √2 at the most.
    return max(rest, found.along / math.sqrt(2))
