"""lorakit extract."""

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from lorakit.cli._completion import complete_sum
from lorakit.cli._inputs import UserPresets, read_presets
from lorakit.cli._options import (
    Common,
    presets_file_option,
    rank_options,
    to_option,
    writing_options,
)
from lorakit.cli._progress import watching
from lorakit.cli._sides import Side, open_sides
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
    from collections.abc import Sequence

    from lorakit.linalg.ranks import RankRule
    from lorakit.lorafile import LoraFile
    from lorakit.operations.choice import Choice
    from lorakit.operations.pieces import Piece
    from lorakit.report import Report

    Made = tuple[LoraFile | None, Report, Sequence[Piece]]


class Settings(TypedDict):
    """What both kinds of extraction are told."""

    rule: "RankRule"
    choice: "Choice"
    alpha: float | None
    dialect: str


@click.command()
@click.argument("original", shell_complete=complete_sum)
@click.argument("tuned", shell_complete=complete_sum)
@click.option(
    "--as",
    "kind",
    type=click.Choice(("lora", "locon", "dora", "full")),
    help=(
        "locon takes 3x3 convolutions too (chosen when --conv-rank is given, or no rank); dora "
        "adds a magnitude by output; full keeps ΔW itself, biases and norms too."
    ),
)
@click.option("--only", multiple=True, metavar="REGEX", help="Layers by name or block id.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out layers likewise.")
@click.option(
    "--min-change",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Leave out a layer whose ‖ΔW‖/‖W‖ is below; 0 leaves out equal layers only.",
)
@click.option("--alpha", type=float, help="The stored alpha; the rank if left out. ΔW is the same.")
@click.option(
    "--svd",
    type=click.Choice(("auto", "exact", "fast")),
    default="auto",
    show_default=True,
    help="How a dense ΔW is decomposed; fast is randomised, with its error measured.",
)
@to_option
@presets_file_option
@writing_options
@rank_options
def extract(
    *,
    original: str,
    tuned: str,
    kind: str | None,
    only: tuple[str, ...],
    exclude: tuple[str, ...],
    min_change: float,
    alpha: float | None,
    svd: str,
    dialect: str | None,
    presets_file: Path | None,
    rule: "RankRule",
    common: Common,
) -> None:
    """Write the LoRA that turns ORIGINAL into TUNED: ΔW = TUNED − ORIGINAL.

    Each side is a model (PATH[+LORA]...), a LoRA (PATH[:STRENGTH]...) or a stack of LoRAs joined
    by +. Two LoRAs, or two expressions on one base, are subtracted exactly.
    """
    report = make(
        original,
        tuned,
        kind=kind,
        only=only,
        exclude=exclude,
        min_change=min_change,
        alpha=alpha,
        svd=svd,
        dialect=dialect,
        presets=read_presets(presets_file),
        rule=rule,
        common=common,
    )
    show(common, report)


def make(
    original: str,
    tuned: str,
    *,
    kind: str | None,
    only: tuple[str, ...],
    exclude: tuple[str, ...],
    min_change: float,
    alpha: float | None,
    svd: str,
    dialect: str | None,
    presets: UserPresets,
    rule: "RankRule",
    common: Common,
) -> "Report":
    """Extract a LoRA as the command does."""
    from lorakit.operations.choice import Choice

    if alpha == 0:
        raise SpecError("--alpha 0 would make the LoRA do nothing; give another number.")
    convs = rule.conv_rank is not None or rule.exact if kind is None else kind == "locon"
    convs = convs or kind == "full" or (kind == "dora" and rule.exact)
    choice = Choice(
        convs=convs,
        kind=kind if kind in ("dora", "full") else "lora",
        only=only,
        exclude=exclude,
        min_change=min_change,
        svd=svd,
        dtype=common.dtype or Choice().dtype,
    )
    if kind == "full" and not rule.exact:
        raise SpecError("--as full keeps ΔW itself, which has no rank; leave the rank rules out.")
    sides = open_sides(original, tuned, presets=presets, common=common)
    options = {
        "as": kind,
        "only": only,
        "exclude": exclude,
        "min_change": min_change or None,
        "alpha": alpha,
        "svd": svd,
        "to": dialect,
        **shared_options(common),
        **rule_options(rule),
    }
    made_by = recipe("extract", [side.recipe for side in sides], options)
    settings: Settings = {
        "rule": rule if common.dry_run else sized(rule, common, made_by=made_by),
        "choice": choice,
        "alpha": alpha,
        "dialect": dialect or "kohya",
    }
    extracted = _from_loras if sides[0].source is None else _from_models
    lora, report, pieces = extracted(sides, settings, common)
    if lora is None:
        return report
    return finish_lora(
        lora,
        report,
        common,
        made_by=made_by,
        inputs=[path for side in sides for path in side.paths],
        pieces=pieces,
    )


def _from_loras(sides: tuple[Side, Side], settings: "Settings", common: Common) -> "Made":
    from lorakit.lorafile import joint_dtype
    from lorakit.models import open_model
    from lorakit.operations.plan import plan_lora
    from lorakit.operations.subtract import difference, subtract, subtract_pieces
    from lorakit.tensorfile.source import open_source

    stacks = stored_as(sides[0].stack, common), stored_as(sides[1].stack, common)
    if settings["choice"].kind != "lora":
        raise SpecError("--as dora and --as full need two models; two LoRAs give a LoRA.")
    base = None if sides[0].base is None else open_source(sides[0].base)
    pieces, _ = subtract_pieces(
        *stacks,
        settings["choice"],
        model=None if base is None else open_model(base),
        dialect=settings["dialect"],
    )
    compute = common.compute()
    if common.dry_run:
        loras = [lora for lora, _ in difference(*stacks)]
        dtype = common.dtype or joint_dtype(lora.dtype for lora in loras)
        rule = settings["rule"]
        plan = plan_lora(
            "extract",
            pieces,
            rule=rule,
            dtype=dtype,
            inputs=loras,
            compute=compute,
            alpha=settings["alpha"],
        )
        return None, plan, pieces
    with watching(quiet=common.quiet) as progress:
        lora, report = subtract(
            *stacks, **settings, against=base, compute=compute, progress=progress
        )
    return lora, report, pieces


def _from_models(sides: tuple[Side, Side], settings: "Settings", common: Common) -> "Made":
    from lorakit.models import open_model
    from lorakit.operations.extract import DEFAULT_RULE, extract_pieces
    from lorakit.operations.extract import extract as extract_lora
    from lorakit.operations.plan import plan_lora

    before, after = (side.source for side in sides)
    if before is None or after is None:
        raise SpecError("extract needs two models, or two LoRAs.")
    if settings["rule"].exact:
        settings["rule"] = DEFAULT_RULE
    compute, allowed = common.compute(), common.allow_unmatched
    models = open_model(before), open_model(after)
    pieces, _ = extract_pieces(
        *models,
        choice=settings["choice"],
        dialect=settings["dialect"],
        allow_unmatched=allowed,
    )
    if common.dry_run:
        rule, dtype = settings["rule"], settings["choice"].dtype
        plan = plan_lora(
            "extract",
            pieces,
            rule=rule,
            dtype=dtype,
            inputs=[],
            compute=compute,
            alpha=settings["alpha"],
        )
        return None, plan, pieces
    with watching(quiet=common.quiet) as progress:
        lora, report = extract_lora(
            before,
            after,
            **settings,
            allow_unmatched=allowed,
            compute=compute,
            progress=progress,
        )
    return lora, report, pieces
