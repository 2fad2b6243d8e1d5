"""--dry-run: what a command would write and take, from shapes alone."""

from collections.abc import Sequence
from dataclasses import replace

from lorakit.compute import Compute
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.models import Applied, stored_specs
from lorakit.operations.budget import ITEMSIZE
from lorakit.operations.pieces import KEY_OVERHEAD, Piece
from lorakit.operations.spectra import bytes_of_group
from lorakit.operations.truncation import is_narrow
from lorakit.report import Plan, Report, Row
from lorakit.tensorfile.header import format_header

PROCESS = 400 * 2**20
"""Bytes that Python with torch takes before it does anything, rounded up."""


def plan_lora(
    command: str,
    pieces: Sequence[Piece],
    *,
    rule: RankRule,
    dtype: str,
    inputs: Sequence[LoraFile],
    compute: Compute,
    alpha: float | None = None,
) -> Report:
    """Return the ranks that a rule can reach at most, the output's size and the memory for it."""
    rows = []
    kept = 0
    for piece in pieces:
        cap = rule.cap(piece.conv)
        rank = piece.rank_bound if cap is None else min(cap, piece.rank_bound)
        kept += rank * piece.bytes_a_rank
        rows.append(
            Row(
                module=piece.module,
                block=piece.block,
                rank_before=piece.rank_before,
                rank_after=rank,
            )
        )
    size = kept * ITEMSIZE.get(dtype, 1) + KEY_OVERHEAD * len(rows)
    held = sum(lora.nbytes for lora in {id(lora): lora for lora in inputs}.values())
    rounded = rule.size is None and is_narrow(dtype, alpha=alpha, compute=compute)
    made = size if rounded else 4 * kept + size
    return Report(
        command=command,
        rows=tuple(rows),
        plan=Plan(
            layers=len(rows),
            output_bytes=size if rule.size is None else min(size, rule.size),
            peak_bytes=PROCESS + held + made + _in_flight(pieces, rule, compute),
            device=compute.device,
            threads=compute.threads,
        ),
    )


def plan_kept(report: Report, kept: LoraFile, *, lora: LoraFile, compute: Compute) -> Report:
    """Return the size of a LoRA whose factors are written as they are, and the memory for it."""
    return replace(
        report,
        plan=Plan(
            layers=len(kept.adapters),
            output_bytes=kept.nbytes + KEY_OVERHEAD * len(kept.adapters),
            peak_bytes=PROCESS + lora.nbytes + 2 * kept.nbytes,
            device=compute.device,
            threads=compute.threads,
        ),
    )


def plan_model(
    report: Report,
    applied: Applied,
    *,
    dtype: str | None,
    inputs: Sequence[LoraFile],
    compute: Compute,
) -> Report:
    """Return the size of the checkpoint that would be written, and the memory for it."""
    specs = stored_specs(applied, dtype)
    header = len(format_header(specs, applied.metadata))
    held = sum(lora.nbytes for lora in {id(lora): lora for lora in inputs}.values())
    return replace(
        report,
        plan=Plan(
            layers=len(report.rows),
            output_bytes=header + sum(spec.nbytes for spec in specs.values()),
            peak_bytes=PROCESS + held + compute.memory,
            device=compute.device,
            threads=compute.threads,
        ),
    )


def _in_flight(pieces: Sequence[Piece], rule: RankRule, compute: Compute) -> int:
    return max([compute.memory, *(bytes_of_group([piece], rule) for piece in pieces)])
