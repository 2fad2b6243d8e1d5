"""What changed between two models and has no place in a LoRA."""

import math
from collections.abc import Mapping
from dataclasses import replace

from lorakit.compute import Compute, ordered_map
from lorakit.linalg.tiles import squared_distance
from lorakit.models import FLOATS, Model
from lorakit.names.blocks import block_of
from lorakit.operations.choice import Choice
from lorakit.progress import Progress
from lorakit.report import Report
from lorakit.tensorfile.blocks import BLOCK, blocks
from lorakit.tensorfile.source import TensorSource


def with_lost_changes(
    report: Report,
    original: Model,
    tuned: Model,
    *,
    choice: Choice,
    compute: Compute,
    progress: Progress,
) -> Report:
    """Add to the report what the extraction could not hold, each tensor with its share.

    The share is ‖Δ‖² of the tensor over ‖Δ‖² of the whole model, so that the shares and what the
    layers hold add up to 1.
    """
    parts = [part for row in report.rows for part in tuned.parts(row.module)]
    held = {slot.key for part in parts if (slot := tuned.slot(part)) is not None}
    ours, theirs = original.source, tuned.source
    keys = [key for key, spec in theirs.specs.items() if key not in held and key in ours.specs]
    keys = [key for key in keys if ours.specs[key].shape == theirs.specs[key].shape]
    changes: dict[str, float] = {}
    squares = ordered_map(
        lambda key: _square(ours, theirs, key),
        keys,
        compute=compute,
        cost=lambda key: _cost(ours, theirs, key),
    )
    for done, (key, square) in enumerate(zip(keys, squares, strict=True), start=1):
        if square:
            changes[key] = square
        progress("other tensors", done, len(keys))
    whole = math.fsum([*changes.values(), *((row.norm or 0.0) ** 2 for row in report.rows)])
    shares = {key: square / whole for key, square in sorted(changes.items())}
    notes = *_notes(original, tuned, report), *_left_convs(tuned, shares, choice)
    return replace(report, lost=shares, notes=notes)


def _left_convs(tuned: Model, shares: Mapping[str, float], choice: Choice) -> tuple[str, ...]:
    """Say what share of the change is in convolutions that were left for want of a rank."""
    if choice.convs or choice.kind == "full":
        return ()
    architecture = tuned.index.architecture
    kernels = [
        part
        for module in tuned.index.layers
        if math.prod(tuned.shape(module)[2:]) > 1
        and choice.takes(module, block_of(module, architecture))
        for part in tuned.parts(module)
    ]
    keys = {slot.key for part in kernels if (slot := tuned.slot(part)) is not None}
    share = math.fsum(shares.get(key, 0.0) for key in keys)
    if not share:
        return ()
    return (f"Convolutions over 1x1 hold {share:.1%} of the change; --conv-rank takes them too.",)


def _square(ours: TensorSource, theirs: TensorSource, key: str) -> float:
    spec = theirs.specs[key]
    if spec.dtype not in FLOATS:
        return 0.0
    old, new = (blocks(source, key, 0, spec.numel) for source in (ours, theirs))
    return squared_distance(zip(new, old, strict=True))


def _cost(ours: TensorSource, theirs: TensorSource, key: str) -> int:
    count = theirs.specs[key].numel
    stored = all(source.extent(key) is not None for source in (ours, theirs))
    return 16 * (min(count, BLOCK) if stored else count)


def _notes(original: Model, tuned: Model, report: Report) -> tuple[str, ...]:
    notes = list(report.notes)
    same = sum(1 for row in report.rows if row.rank_after == 0)
    if same:
        notes.append(f"{same} layers did not change, or by less than --min-change: left out.")
    if original.index.layout != tuned.index.layout:
        notes.append(
            "The models are in different layouts: norms, biases and embeddings were not compared."
        )
        return tuple(notes)
    for first, second in ((original, tuned), (tuned, original)):
        only = len(first.source.specs.keys() - second.source.specs.keys())
        if only:
            notes.append(f"{only} tensors are only in {first.source.name}.")
    return tuple(notes)
