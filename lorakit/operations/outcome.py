"""The LoRA and the report that come out of cut pieces."""

from collections.abc import Sequence
from dataclasses import replace

from lorakit.compute import Compute
from lorakit.errors import UnmatchedError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.operations.pieces import Piece, truncate
from lorakit.progress import Progress
from lorakit.report import Report

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def from_pieces(
    pieces: Sequence[Piece],
    *,
    command: str,
    rule: RankRule,
    like: LoraFile,
    compute: Compute,
    progress: Progress,
    alpha: float | None = None,
    method: str = "auto",
    dropped: tuple[str, ...] = (),
) -> tuple[LoraFile, Report]:
    """Cut the pieces into a LoRA like `like`; what keeps no direction is named as dropped.

    Raises:
        UnmatchedError: nothing is left.
    """
    adapters, rows = truncate(
        pieces,
        rule=rule,
        compute=compute,
        alpha=alpha,
        itemsize=ITEMSIZE.get(like.dtype, 1),
        method=method,
        progress=progress,
    )
    if not adapters:
        raise UnmatchedError(
            "Nothing is left to write: every layer is zero or cancels; "
            "check that the inputs differ and that the strengths are meant."
        )
    gone = tuple(row.module for row in rows if not row.rank_after)
    lora = replace(like, name=command, adapters=adapters, sha256="", unclaimed=())
    return lora, Report(command=command, rows=rows, dropped=(*dropped, *gone))
