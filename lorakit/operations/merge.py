"""merge: a stack of LoRAs becomes one LoRA."""

from dataclasses import replace

from lorakit.compute import Compute
from lorakit.errors import LorakitError, UnmatchedError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, joint_dtype
from lorakit.operations.outcome import from_pieces
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import Stack, architecture_of, parts_of, sum_piece, unclaimed
from lorakit.progress import Progress, silent
from lorakit.report import Report


def merge(
    stack: Stack,
    *,
    rule: RankRule | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Merge LoRAs into one whose ΔW is Σ strength · ΔW, exactly or cut to a rank.

    Args:
        stack: (LoRA, strength) pairs; a strength is a number or a `Strength`.
        rule: how much to keep; without one the sum of the ranks, cut to the numerical rank.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Returns:
        The LoRA, in fp32 factors balanced by √σ, to be stored in the joint dtype of the inputs;
        and the report, a row a module.

    Raises:
        AdapterError: the LoRAs are for different models.
        UnmatchedError: everything cancels, or every strength is zero.

    Source: the sum is the web UI's; kohya's `merge_lora.py` adds factors, which adds cross terms.
    """
    rule = RankRule() if rule is None else rule
    pieces, absent = merge_pieces(stack)
    merged, report = from_pieces(
        pieces,
        command="merge",
        rule=rule,
        like=model_of(stack),
        compute=compute or Compute.of(),
        progress=progress,
        dropped=absent,
    )
    return merged, replace(report, unmatched=unclaimed(stack))


def merge_pieces(stack: Stack) -> tuple[list[Piece], tuple[str, ...]]:
    """Return a piece a module, and the modules that every strength sets to zero."""
    if not stack:
        raise LorakitError("merge needs at least one LoRA, found none; name one or more files.")
    architecture_of(stack)
    modules = parts_of(stack)
    block_of = {module: lora.block(module) for lora, _ in stack for module in lora.adapters}
    pieces = [
        sum_piece(module, block_of[module], parts) for module, parts in modules.items() if parts
    ]
    if not pieces:
        raise UnmatchedError(
            "Every strength is zero, so nothing is left to write; give one LoRA a strength."
        )
    return pieces, tuple(module for module, parts in modules.items() if not parts)


def model_of(stack: Stack) -> LoraFile:
    """Return the LoRA that the output is like: the first, in the dtype that holds them all."""
    dtype = joint_dtype(lora.dtype for lora, _ in stack)
    return replace(stack[0][0], architecture=architecture_of(stack), dtype=dtype)
