"""lorakit convert."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._completion import complete_path
from lorakit.cli._inputs import load_stack, lora_specs, model_record
from lorakit.cli._options import (
    Common,
    against_option,
    rank_options,
    to_option,
    writing_options,
)
from lorakit.cli._progress import watching
from lorakit.cli._write import (
    finish_lora,
    recipe,
    rule_options,
    shared_options,
    show,
    sized,
    stored_as,
)
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.linalg.ranks import RankRule
    from lorakit.names.specs import LoraSpec
    from lorakit.report import Report


@click.command()
@click.argument("lora", shell_complete=complete_path)
@to_option
@click.option(
    "--as",
    "kind",
    type=click.Choice(("lora",)),
    help="Make a plain LoRA of LoHa, LoKr, GLoRA, OFT, DoRA and full differences.",
)
@against_option
@click.option(
    "--repair", is_flag=True, help="Mend known faults of other tools' files, and say which."
)
@writing_options
@rank_options
def convert(
    *,
    lora: str,
    dialect: str | None,
    kind: str | None,
    against: str | None,
    repair: bool,
    rule: "RankRule",
    common: Common,
) -> None:
    """Write a LoRA under other names: for kohya, PEFT, diffusers or ComfyUI.

    ΔW stays the same. Rank rules hold for what --as lora makes plain; without one it keeps its
    whole rank.
    """
    if not (dialect or kind or repair or common.dtype):
        raise SpecError(
            "convert needs to know what to change; give --to, --as, --dtype or --repair."
        )
    if not rule.exact and kind is None:
        raise SpecError("Rank rules hold for --as lora; to cut a rank use lorakit resize.")
    (spec,) = lora_specs([lora])
    report = make(
        spec,
        dialect=dialect,
        kind=kind,
        against=against,
        repair=repair,
        rule=rule,
        common=common,
    )
    show(common, report)


def make(
    spec: "LoraSpec",
    *,
    dialect: str | None,
    kind: str | None,
    against: str | None,
    repair: bool,
    rule: "RankRule",
    common: Common,
) -> "Report":
    """Convert a LoRA as the command does."""
    from lorakit.operations.convert import convert as convert_lora
    from lorakit.operations.convert import converted_pieces
    from lorakit.operations.plan import plan_kept
    from lorakit.tensorfile.source import open_source

    if spec != type(spec)(path=spec.path):
        raise SpecError(f"{spec.path}: convert takes a LoRA without a strength; merge it first.")
    if common.dry_run and (kind or repair):
        raise SpecError("--dry-run reads headers only; --as and --repair need the values.")
    loaded = load_stack(
        [spec], presets={}, header_only=common.dry_run, allow_unmatched=common.allow_unmatched
    )
    ((file, _),) = stored_as(loaded.stack, common)
    base = None if against is None else open_source(against)
    options = {
        "to": dialect,
        "as": kind,
        "against": None if against is None else model_record(against),
        "repair": repair or None,
        **shared_options(common),
        **rule_options(rule),
    }
    made_by = recipe("convert", loaded.recipe(), options)
    with watching(quiet=common.quiet) as progress:
        converted, report = convert_lora(
            file,
            dialect=dialect,
            plain=kind == "lora",
            rule=sized(rule, common, made_by=made_by),
            against=base,
            repair=repair,
            compute=common.compute(),
            progress=progress,
        )
    if common.dry_run:
        return plan_kept(report, converted, lora=file, compute=common.compute())
    return finish_lora(
        converted,
        report,
        common,
        made_by=made_by,
        inputs=[*loaded.paths, *([Path(against)] if against else [])],
        pieces=converted_pieces(converted if repair else file, converted, base),
    )
