"""resize: the best approximation of a LoRA at another rank."""

from dataclasses import replace

from lorakit.compute import Compute
from lorakit.errors import SpecError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.models import open_model
from lorakit.operations.merge import merge_pieces
from lorakit.operations.outcome import from_pieces
from lorakit.operations.stack import unclaimed
from lorakit.progress import Progress, silent
from lorakit.report import Report
from lorakit.tensorfile.source import TensorSource


def resize(
    lora: LoraFile,
    *,
    rule: RankRule,
    against: TensorSource | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Cut a LoRA to another rank, optimally and from its factors alone.

    Args:
        lora: the LoRA.
        rule: how much to keep.
        against: the model that DoRA and its likes are taken on.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Returns:
        The LoRA at its new ranks, and the report: rank before and after, energy kept, error.

    Raises:
        SpecError: the rule asks for nothing.
        UnmatchedError: nothing is left.

    Source: Eckart-Young on the SVD of up @ down taken from the factors; kohya's `resize_lora.py`
    forms the dense product and decomposes that.
    """
    if rule.exact:
        raise SpecError("resize needs a rank rule, found none; give --rank, --energy or --size.")
    model = None if against is None else open_model(against)
    pieces, _ = merge_pieces([(lora, 1.0)], model=model)
    resized, report = from_pieces(
        pieces,
        command="resize",
        rule=rule,
        like=lora,
        compute=compute or Compute.of(),
        progress=progress,
    )
    return resized, replace(report, unmatched=unclaimed([(lora, 1.0)]))
