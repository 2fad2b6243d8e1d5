"""The LoRA and the report that come out of cut pieces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorakit.adapters import Adapter
from lorakit.compute import Compute
from lorakit.errors import UnmatchedError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.operations.budget import budget_of
from lorakit.operations.choice import Choice
from lorakit.operations.pieces import Piece
from lorakit.operations.truncation import truncate
from lorakit.progress import Progress
from lorakit.report import Report, Row


def from_pieces(
    pieces: Sequence[Piece],
    *,
    command: str,
    rule: RankRule,
    like: LoraFile,
    compute: Compute,
    progress: Progress,
    alpha: float | None = None,
    choice: Choice | None = None,
    beside: Mapping[str, Adapter] | None = None,
) -> tuple[LoraFile, Report]:
    """Cut the pieces into a LoRA like `like`; what keeps no direction is named as dropped.

    A size is of the whole file, in which `beside` is written too.

    Raises:
        UnmatchedError: nothing is left.
        SpecError: the size is less than what is written besides takes.
    """
    choice = Choice() if choice is None else choice
    budget = budget_of(pieces, rule, like=like, kind=choice.kind, beside=beside or {})
    adapters, rows = truncate(
        pieces,
        rule=budget.rule,
        names=budget.names,
        compute=compute,
        alpha=alpha,
        dtype=like.dtype,
        method=choice.svd,
        kind=choice.kind,
        progress=progress,
    )
    if not adapters:
        raise UnmatchedError(f"Nothing is left to write: {_why(rule, rows)}.")
    gone = tuple(row.module for row in rows if row.rank_after == 0)
    lora = replace(like, name=command, adapters=adapters, sha256="", unclaimed=())
    return lora, Report(command=command, rows=rows, dropped=gone)


def _why(rule: RankRule, rows: Sequence[Row]) -> str:
    alive = [row for row in rows if row.norm]
    best = max((row.score_cut for row in alive if row.score_cut is not None), default=None)
    if rule.threshold is not None and best is not None:
        return (
            f"no direction has a score of {rule.threshold:g}, the highest is {best:.4g}; give a "
            "lower --threshold"
        )
    if rule.size is not None and alive:
        return f"{rule.size} bytes have no room for one direction; give a larger --size"
    return (
        "every layer is zero or cancels; check that the inputs differ and that the strengths are "
        "meant"
    )
