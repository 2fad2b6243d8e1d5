"""resize: the best approximation of a LoRA at another rank, by itself or as a model sees it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from lorakit.compute import Compute
from lorakit.errors import AdapterError, SpecError
from lorakit.fusing import as_named
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.models import Model, open_model
from lorakit.operations.apply import FIRST_LAYERS
from lorakit.operations.merge import merge_pieces
from lorakit.operations.outcome import from_pieces
from lorakit.operations.pieces import Piece
from lorakit.operations.scores import DEFAULT
from lorakit.operations.stack import check_architecture, flat, known, unclaimed, with_kernel
from lorakit.operations.yardsticks import (
    Yardstick,
    check_model,
    chosen_score,
    scored,
    taken,
)
from lorakit.progress import Progress, silent
from lorakit.report import Report, Row, Scoring
from lorakit.tensorfile.source import TensorSource


def resize(
    lora: LoraFile,
    *,
    rule: RankRule,
    against: TensorSource | None = None,
    score: str | Yardstick | None = None,
    rescale: float = 1.0,
    allow_unmatched: bool = False,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Cut a LoRA to another rank, optimally and from its factors alone.

    Args:
        lora: the LoRA.
        rule: how much to keep.
        against: the model that directions are measured by, and DoRA and its likes are taken on.
        score: what directions are measured by: "fro-ckpt", "spn-ckpt" or "subspace" of the model,
            "fro-lora" or "spn-lora" of the LoRA, or several, "fro-ckpt=0.8,spn-lora=0.2". A
            yardstick where several LoRAs share one reading of the model; see `yardsticks`.
        rescale: multiplies ΔW, before it is measured and in the result.
        allow_unmatched: cut layers that the model lacks without a score.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Returns:
        The LoRA at its new ranks, and the report: rank before and after, energy kept, error; with
        a score also those of the last direction kept and of the first one cut.

    Raises:
        SpecError: the rule asks for nothing, or needs a score that is not there.
        UnmatchedError: nothing is left, or the model lacks a layer.
        AdapterError: a layer of the model has another shape.

    Source: Eckart-Young on the SVD of up @ down taken from the factors; kohya's `resize_lora.py`
    forms the dense product and decomposes that. Scores are those of elias-gaeros' resize_lora.

    - A size is spent by (σ / reference)² a byte, so that with equal references it is the energy's;
      resize_lora describes a score a byte and ranks by the score alone.
    """
    if rule.exact:
        raise SpecError(
            "resize needs a rank rule, found none; give --rank, --energy, --size or, with "
            "--against, --threshold."
        )
    model = None if against is None else open_model(against)
    compute = compute or Compute.of()
    pieces = resize_pieces(lora, model=model, rescale=rescale)
    if not isinstance(score, Yardstick):
        chosen = chosen_score(score, rule, against=model is not None)
        score = None
        if chosen is not None:
            (score,) = taken(
                [(lora, pieces)],
                score=chosen,
                model=model,
                allow_unmatched=allow_unmatched,
                compute=compute,
                progress=progress,
            )
    if score is not None:
        pieces = scored(pieces, score, rule=rule, rescale=rescale)
    resized, report = from_pieces(
        pieces, command="resize", rule=rule, like=lora, compute=compute, progress=progress
    )
    report = replace(report, unmatched=unclaimed([(lora, 1.0)]))
    return resized, report if score is None else _told(report, score, rule, rescale)


def yardsticks(
    loras: Sequence[LoraFile],
    *,
    score: str = DEFAULT,
    against: TensorSource | None = None,
    rescale: float = 1.0,
    allow_unmatched: bool = False,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[Yardstick, ...]:
    """Measure a model's layers once for several LoRAs; `resize` takes what comes back as `score`.

    Args:
        loras: the LoRAs; where the score is of norms alone, headers are enough.
        score: what directions are measured by, as for `resize`.
        against: the model.
        rescale: as for `resize`.
        allow_unmatched: go on where the model lacks a layer.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        SpecError: the score needs a model, or is unknown.
        UnmatchedError: the model lacks a layer.
        AdapterError: a layer of the model has another shape.
    """
    model = None if against is None else open_model(against)
    check_model(score, against=model is not None)
    return taken(
        [(lora, resize_pieces(lora, model=model, rescale=rescale)) for lora in loras],
        score=score,
        model=model,
        allow_unmatched=allow_unmatched,
        compute=compute or Compute.of(),
        progress=progress,
    )


def resize_pieces(
    lora: LoraFile, *, model: Model | None = None, rescale: float = 1.0
) -> list[Piece]:
    """Return a piece a module: its exact ΔW, multiplied by `rescale`.

    Raises:
        SpecError: `rescale` is not above 0.
        AdapterError: a layer of the model has another shape, or a kind needs a model.
    """
    if not 0 < rescale < math.inf:
        raise SpecError(f"rescale must be above 0 and finite, found {rescale:g}.")
    pieces, _ = merge_pieces([(lora, rescale)], model=model)
    if model is None:
        return pieces
    adapters = as_named(lora, lora.dialect).adapters
    own = {module: adapter.shape for module, adapter in adapters.items() if known(adapter)}
    return [_fitted(piece, own.get(piece.module, piece.shape), lora, model) for piece in pieces]


def _fitted(piece: Piece, own: tuple[int, ...], lora: LoraFile, model: Model) -> Piece:
    """Check a piece against the model; a first layer may have more inputs there."""
    if flat(piece.shape) == flat(own):
        return piece
    shape = with_kernel(piece.module, own)
    grown = len(shape) == len(piece.shape) > 1 and piece.shape[1] > shape[1]
    others = (shape[0], *shape[2:]) == (piece.shape[0], *piece.shape[2:])
    if grown and others and piece.module.endswith(FIRST_LAYERS):
        return replace(piece, shape=shape)
    check_architecture(model, [(lora, 1.0)])
    raise AdapterError(
        f"{lora.name}: {piece.module} expected a change of {list(piece.shape)} as the weight in "
        f"{model.source.name} is, found {list(own)}; the LoRA was made for another model."
    )


def _told(report: Report, yardstick: Yardstick, rule: RankRule, rescale: float) -> Report:
    def scores(rows: Sequence[Row], name: str) -> list[float]:
        return [score for row in rows if (score := getattr(row, name)) is not None]

    return replace(
        report,
        notes=(*report.notes, *yardstick.notes(rule)),
        scoring=Scoring(
            score=yardstick.score,
            against=yardstick.against,
            rescale=rescale,
            threshold=rule.threshold,
            lowest_kept=min(scores(report.rows, "score_kept"), default=None),
            highest_cut=max(scores(report.rows, "score_cut"), default=None),
        ),
    )
