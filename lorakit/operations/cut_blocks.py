"""cut-blocks: delete the blocks that a LoRA does not need, scale the others."""

from collections.abc import Mapping
from dataclasses import replace

from lorakit.errors import UnmatchedError
from lorakit.linalg.factored import norm
from lorakit.lorafile import LoraFile
from lorakit.names.elements import ElementRule
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import sum_piece, unclaimed
from lorakit.operations.strength import block_weight
from lorakit.progress import Progress, silent
from lorakit.report import Report, Row


def cut_blocks(
    lora: LoraFile,
    *,
    blocks: Mapping[str, float],
    elements: tuple[ElementRule, ...] = (),
    measure: bool = True,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Scale each block's ΔW once, and delete what a weight of 0 leaves empty.

    The factors keep their bytes: the weight goes into alpha, its sign into `up`.

    Args:
        lora: the LoRA.
        blocks: block id -> weight; an id that is not named keeps 1.
        elements: rules for parts of blocks, which replace the block's weight.
        measure: take the norms for the report; a LoRA without values has none.
        progress: called with (what, done, total).

    Returns:
        The LoRA, and a row a module: `norm` is ‖ΔW‖ before the cut, the note tells the weight.

    Raises:
        UnmatchedError: nothing is left.

    Source: LoRA Block Weight; unlike it, one factor is scaled once for every kind of adapter.
    """
    kept = {}
    rows = []
    total = len(lora.adapters)
    for done, (module, adapter) in enumerate(lora.adapters.items(), start=1):
        weight = block_weight(lora, module, blocks=blocks, elements=elements)
        if weight:
            kept[module] = adapter if weight == 1 else adapter.scaled(weight)
        rows.append(
            Row(
                module=module,
                block=lora.block(module),
                rank_before=adapter.rank,
                rank_after=adapter.rank if weight else 0,
                norm=norm(adapter.factors()) if measure else None,
                note=f"weight {weight:g}",
            )
        )
        progress("layers", done, total)
    if not kept:
        raise UnmatchedError(
            f"{lora.name}: these weights cut all {total} layers, nothing is left to write; "
            "keep at least one block."
        )
    cut = tuple(row.module for row in rows if not row.rank_after)
    return replace(lora, adapters=kept, sha256=""), Report(
        command="cut-blocks",
        rows=tuple(rows),
        dropped=cut,
        unmatched=unclaimed([(lora, 1.0)]),
    )


def cut_pieces(
    lora: LoraFile,
    cut: LoraFile,
    *,
    blocks: Mapping[str, float],
    elements: tuple[ElementRule, ...] = (),
) -> list[Piece]:
    """Return weight · ΔW of every layer that a cut kept, to compare the output with."""
    return [
        sum_piece(
            module,
            lora.block(module),
            [(lora.adapters[module], block_weight(lora, module, blocks=blocks, elements=elements))],
        )
        for module in cut.adapters
    ]
