"""cut-blocks: delete the blocks that a LoRA does not need, scale the others."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lorakit.adapters import Adapter
from lorakit.errors import AdapterError, UnmatchedError
from lorakit.linalg.tiles import size
from lorakit.lorafile import LoraFile
from lorakit.models import Model, open_model
from lorakit.names.elements import ElementRule
from lorakit.operations.mixing import Part
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import sum_piece, unclaimed
from lorakit.operations.strength import block_weight
from lorakit.progress import Progress, silent
from lorakit.report import Report, Row
from lorakit.tensorfile.source import TensorSource


def cut_blocks(
    lora: LoraFile,
    *,
    blocks: Mapping[str, float],
    elements: tuple[ElementRule, ...] = (),
    against: TensorSource | None = None,
    measure: bool = True,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Scale each block's ΔW once, and delete what a weight of 0 leaves empty.

    The factors keep their bytes: the weight goes into alpha, its sign into `up`. A DoRA at another
    weight is a DoRA again, of the same rank; for that the model must be known.

    Args:
        lora: the LoRA.
        blocks: block id -> weight; an id that is not named keeps 1.
        elements: rules for parts of blocks, which replace the block's weight.
        against: the model that DoRA and its likes are taken on, for weights other than 0 and 1.
        measure: take the norms for the report; a LoRA without values has none.
        progress: called with (what, done, total).

    Returns:
        The LoRA, and a row a module: `norm` is ‖ΔW‖ before the cut, `energy` 1 where the layer
        stays and 0 where it is deleted, the note tells the weight.

    Raises:
        AdapterError: a weight is not 0 or 1, and the layer's kind cannot hold it.
        UnmatchedError: nothing is left.

    Source: LoRA Block Weight; unlike it, one factor is scaled once for every kind of adapter.
    """
    model = None if against is None else open_model(against)
    kept = {}
    rows = []
    total = len(lora.adapters)
    for done, (module, adapter) in enumerate(lora.adapters.items(), start=1):
        weight = block_weight(lora, module, blocks=blocks, elements=elements)
        if weight:
            kept[module] = _weighted(lora, module, weight, model)
        norm = _norm(adapter, model, module) if measure else None
        rows.append(
            Row(
                module=module,
                block=lora.block(module),
                rank_before=adapter.rank,
                rank_after=adapter.rank if weight else 0,
                norm=norm,
                energy=None if norm is None else float(weight != 0),
                note=f"weight {weight:g}",
            )
        )
        progress("layers", done, total)
    if not kept:
        raise UnmatchedError(
            f"{lora.name}: these weights cut all {total} layers, nothing is left to write; "
            "keep at least one block."
        )
    cut = tuple(row.module for row in rows if row.rank_after == 0)
    return replace(lora, adapters=kept, sha256=""), Report(
        command="cut-blocks",
        rows=tuple(rows),
        dropped=cut,
        unmatched=unclaimed([(lora, 1.0)]),
    )


def _weighted(lora: LoraFile, module: str, weight: float, model: Model | None) -> Adapter:
    adapter = lora.adapters[module]
    if weight == 1:
        return adapter
    base = model.weight(module) if adapter.needs_base and model is not None else None
    try:
        return adapter.scaled(weight, base)
    except AdapterError as error:
        raise AdapterError(f"{lora.name}: {module} {error}.") from None


def _norm(adapter: Adapter, model: Model | None, module: str) -> float | None:
    if not adapter.needs_base:
        return size(adapter.change())
    return None if model is None else size(adapter.change(model.weight(module)))


def cut_pieces(
    lora: LoraFile,
    cut: LoraFile,
    *,
    blocks: Mapping[str, float],
    elements: tuple[ElementRule, ...] = (),
    against: TensorSource | None = None,
) -> list[Piece]:
    """Return weight · ΔW of every layer that a cut kept, to compare the output with.

    A layer whose change needs a model that is not there was kept as it is, and is left out.
    """
    model = None if against is None else open_model(against)
    return [
        sum_piece(
            module,
            lora.block(module),
            [
                Part(
                    adapter=lora.adapters[module],
                    strength=block_weight(lora, module, blocks=blocks, elements=elements),
                )
            ],
            None if model is None else partial(model.weight, module),
            None if model is None else model.shape(module),
        )
        for module in cut.adapters
        if model is not None or not lora.adapters[module].needs_base
    ]
