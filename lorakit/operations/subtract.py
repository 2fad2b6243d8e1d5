"""extract between two stacks of LoRAs: exact, with no dense matrix and no base model."""

from dataclasses import replace

from lorakit.compute import Compute
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.models import Model, open_model
from lorakit.operations.choice import Choice
from lorakit.operations.merge import merge_pieces, model_of
from lorakit.operations.outcome import from_pieces
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import Stack, unclaimed
from lorakit.operations.strength import Strength
from lorakit.progress import Progress, silent
from lorakit.report import Report
from lorakit.tensorfile.source import TensorSource


def difference(original: Stack, tuned: Stack) -> Stack:
    """Return the stack whose sum is tuned − original."""
    return (*tuned, *((lora, _negated(strength)) for lora, strength in original))


def _negated(strength: float | Strength) -> float | Strength:
    if isinstance(strength, Strength):
        return replace(strength, unet=-strength.unet, te=-strength.te)
    return -strength


def subtract_pieces(
    original: Stack,
    tuned: Stack,
    choice: Choice | None = None,
    *,
    model: Model | None = None,
    dialect: str | None = None,
) -> tuple[list[Piece], tuple[str, ...]]:
    """Return a piece a chosen module of tuned − original, and the modules set to zero."""
    pieces, absent = merge_pieces(difference(original, tuned), model=model, dialect=dialect)
    if choice is not None:
        pieces = [piece for piece in pieces if choice.takes(piece.module, piece.block)]
    return pieces, absent


def subtract(
    original: Stack,
    tuned: Stack,
    *,
    rule: RankRule | None = None,
    choice: Choice | None = None,
    alpha: float | None = None,
    dialect: str | None = None,
    against: TensorSource | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Return the LoRA that turns the base with `original` into the base with `tuned`.

    Args:
        original: (LoRA, strength) pairs, perhaps none.
        tuned: likewise.
        rule: how much to keep; without one the numerical rank.
        choice: which layers; None for all.
        alpha: what to store as alpha, ΔW unchanged; None for the rank.
        dialect: the names to write; None for those of the first LoRA of `tuned`.
        against: the model that DoRA and its likes are taken on.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        AdapterError: the LoRAs are for different models.
        UnmatchedError: the two sides are equal.

    Source: the difference variant of the copy-machine method; kohya's `merge_lora.py --concat`
    with ratios 1 and -1 gives half of it.
    """
    stack = difference(original, tuned)
    like = model_of(stack)
    model = None if against is None else open_model(against)
    pieces, absent = subtract_pieces(
        original, tuned, choice, model=model, dialect=dialect or like.dialect
    )
    lora, report = from_pieces(
        pieces,
        command="extract",
        rule=RankRule() if rule is None else rule,
        like=replace(like, dialect=dialect or like.dialect),
        alpha=alpha,
        compute=compute or Compute.of(),
        progress=progress,
    )
    dropped = (*absent, *report.dropped)
    return lora, replace(report, dropped=dropped, unmatched=unclaimed(stack))
