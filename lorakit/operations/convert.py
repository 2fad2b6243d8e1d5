"""convert: the same LoRA under other names, or as a plain LoRA."""

from dataclasses import replace

from lorakit.adapters import Lora, is_vector
from lorakit.compute import Compute
from lorakit.fusing import as_named
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.models import open_model
from lorakit.operations.merge import merge_pieces
from lorakit.operations.outcome import from_pieces
from lorakit.operations.pieces import Piece
from lorakit.operations.repair import repaired
from lorakit.progress import Progress, silent
from lorakit.report import Report, Row
from lorakit.tensorfile.source import TensorSource


def convert(
    lora: LoraFile,
    *,
    dialect: str | None = None,
    plain: bool = False,
    rule: RankRule | None = None,
    against: TensorSource | None = None,
    repair: bool = False,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Return a LoRA under the names of another dialect, ΔW unchanged.

    Tensors keep their values wherever the dialect has a place for them; fused modules are cut into
    rows and parts are joined exactly.

    Args:
        lora: the LoRA.
        dialect: the names to write; None for its own.
        plain: make LoRAs of LoHa, LoKr, GLoRA, OFT, DoRA and full differences.
        rule: how much to keep of what is made plain; without one its numerical rank.
        against: the model that DoRA and its likes are taken on, for `plain`.
        repair: mend known faults of other tools, each with a note.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        AdapterError: a kind has no place in the dialect, or needs its base.
        UnmatchedError: nothing is left.
    """
    notes: tuple[str, ...] = ()
    if repair:
        lora, notes = repaired(lora)
    named = replace(as_named(lora, dialect or lora.dialect), dialect=dialect or lora.dialect)
    strange = {m: a for m, a in named.adapters.items() if plain and not is_plain(named, m)}
    rows = {m: _kept(named, m) for m in named.adapters if m not in strange}
    adapters = {module: named.adapters[module] for module in rows}
    dropped: tuple[str, ...] = ()
    if strange:
        made, report = from_pieces(
            plain_pieces(replace(named, adapters=strange), against),
            command="convert",
            rule=RankRule() if rule is None else rule,
            like=named,
            compute=compute or Compute.of(),
            progress=progress,
            beside=adapters,
        )
        adapters |= made.adapters
        rows |= {row.module: row for row in report.rows}
        dropped = report.dropped
    done = replace(named, adapters={module: adapters[module] for module in sorted(adapters)})
    return replace(done, sha256=""), Report(
        command="convert",
        rows=tuple(rows[module] for module in sorted(rows)),
        dropped=dropped,
        unmatched=tuple(f"{lora.name}: {key}" for key in lora.unclaimed),
        notes=notes,
    )


def is_plain(lora: LoraFile, module: str) -> bool:
    """Tell whether a module is a LoRA already, or a bias or a norm, which never is one."""
    adapter = lora.adapters[module]
    return isinstance(adapter, Lora) or is_vector(adapter.shape)


def plain_pieces(lora: LoraFile, against: TensorSource | None) -> list[Piece]:
    """Return the exact ΔW of a LoRA's modules, those that need a base taken on a model."""
    model = None if against is None else open_model(against)
    return merge_pieces([(lora, 1.0)], model=model)[0]


def converted_pieces(
    lora: LoraFile, converted: LoraFile, against: TensorSource | None = None
) -> list[Piece]:
    """Return the exact ΔW of every module that was converted, to compare the output with."""
    named = replace(as_named(lora, converted.dialect), dialect=converted.dialect)
    kept = {m: a for m, a in named.adapters.items() if m in converted.adapters}
    readable = {m: a for m, a in kept.items() if against is not None or not a.needs_base}
    return plain_pieces(replace(named, adapters=readable), against) if readable else []


def _kept(lora: LoraFile, module: str) -> Row:
    adapter = lora.adapters[module]
    return Row(
        module=module,
        block=lora.block(module),
        rank_before=adapter.rank,
        rank_after=adapter.rank,
        error=0.0,
        note=adapter.kind,
    )
