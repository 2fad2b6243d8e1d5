"""lorakit merge."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._compare_view import show_comparison
from lorakit.cli._completion import complete_path, complete_sum
from lorakit.cli._inputs import (
    Loaded,
    load_stack,
    lora_specs,
    model_record,
    model_spec,
    open_expression,
    read_presets,
    side_record,
)
from lorakit.cli._method import method_options, method_parameters
from lorakit.cli._options import (
    Common,
    against_option,
    presets_file_option,
    rank_options,
    refusing_others,
    writing_options,
)
from lorakit.cli._progress import watching
from lorakit.cli._shell import Named, files_argument
from lorakit.cli._write import (
    finish_lora,
    finish_model,
    recipe,
    rule_options,
    shared_options,
    show,
    sized,
    stored_as,
)
from lorakit.errors import SpecError
from lorakit.methods.method import Method

if TYPE_CHECKING:
    from lorakit.cli._inputs import UserPresets
    from lorakit.linalg.ranks import RankRule
    from lorakit.names.specs import LoraSpec, ModelSpec
    from lorakit.operations.comparison import Comparison
    from lorakit.report import Report

_WITH_RECIPE = (
    *("folders", "into", "against", "output", "overwrite", "device", "threads"),
    *("memory", "dry_run", "verify", "json", "quiet", "verbose"),
)


@click.command()
@files_argument("loras", "LORA...", complete=complete_path, required=False)
@click.option(
    "--into",
    metavar="MODEL",
    shell_complete=complete_sum,
    help="Bake the stack into this checkpoint.",
)
@click.option("--prompt", help="Take all <lora:…> tags of this prompt.")
@click.option(
    "--recipe",
    "repeated",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True),
    help="Repeat what made FILE, to the same bytes, whatever command it was.",
)
@click.option(
    "--lora-dir",
    "folders",
    multiple=True,
    type=Named(path_type=Path, file_okay=False),
    help=(
        "Where the files of the tags, or of a recipe, are; the current folder if left out. "
        "May be repeated."
    ),
)
@presets_file_option
@against_option
@click.option(
    "--analyze", is_flag=True, help="First show how the LoRAs lie to each other; see compare."
)
@writing_options
@refusing_others("repeated", beside=_WITH_RECIPE)
@method_options
@rank_options
def merge(
    *,
    loras: tuple[str, ...],
    into: str | None,
    method: Method,
    prompt: str | None,
    repeated: Path | None,
    folders: tuple[Path, ...],
    presets_file: Path | None,
    against: str | None,
    analyze: bool,
    rule: "RankRule",
    common: Common,
) -> None:
    """Merge LoRAs into one LoRA, or bake them into a checkpoint with --into.

    LORA is PATH[:STRENGTH][:te=S][:unet=S][:lbw=PRESET|CSV], or a web UI tag
    "<lora:style:0.8:lbw=OUTALL>". Strengths are linear and may be negative. With --recipe, FILE
    says all this: every file that lorakit writes holds what made it.
    """
    if repeated is not None:
        from lorakit.cli._replay import repeat

        show(common, repeat(repeated, folders, common, into=into, against=against))
        return
    report = make(
        lora_specs(loras, prompt=prompt, folders=folders),
        into=None if into is None else model_spec(into),
        against=against,
        method=method,
        rule=rule,
        presets=read_presets(presets_file),
        common=common,
        analyze=analyze,
    )
    show(common, report)


def make(
    specs: "tuple[LoraSpec, ...]",
    *,
    into: "ModelSpec | None",
    against: str | None,
    method: Method,
    rule: "RankRule",
    presets: "UserPresets",
    common: Common,
    analyze: bool = False,
) -> "Report":
    """Merge LoRAs as the command does."""
    loaded = load_stack(
        specs,
        presets=presets,
        header_only=common.dry_run,
        allow_unmatched=common.allow_unmatched,
    )
    if into is not None and against is not None:
        raise SpecError("--into names the model already; leave --against out.")
    if into is not None and not rule.exact:
        raise SpecError("Rank rules shape a LoRA; with --into there is none, leave them out.")
    analysis = None
    if analyze:
        analysis = _analyzed(loaded, rule, common, against if into is None else into.path)
    if into is None:
        report = _into_lora(loaded, rule, common, method, against)
    else:
        report = _into_model(into, loaded, presets, common, method)
    return report if analysis is None else replace(report, analysis=analysis.as_dict())


def _analyzed(loaded: Loaded, rule: "RankRule", common: Common, model: str | None) -> "Comparison":
    """Compare the LoRAs, and show what came out unless JSON is asked for."""
    from lorakit.operations.compare import compare
    from lorakit.tensorfile.source import open_source

    if common.dry_run:
        raise SpecError("--analyze reads the LoRAs, --dry-run only their headers; choose one.")
    with watching(quiet=common.quiet) as progress:
        found = compare(
            loaded.stack,
            rule=None if rule.exact or rule.size is not None else rule,
            against=None if model is None else open_source(model),
            compute=common.compute(),
            progress=progress,
        )
    if not common.json:
        show_comparison(found, quiet=common.quiet)
        click.echo(nl=not common.quiet)
    return found


def _into_lora(
    loaded: Loaded, rule: "RankRule", common: Common, method: Method, against: str | None
) -> "Report":
    from lorakit.lorafile import joint_dtype
    from lorakit.models import open_model
    from lorakit.operations.merge import merge as merge_loras
    from lorakit.operations.merge import merge_pieces
    from lorakit.operations.plan import plan_lora
    from lorakit.tensorfile.source import open_source

    stack = stored_as(loaded.stack, common)
    base = None if against is None else open_source(against)
    model = None if base is None else open_model(base)
    pieces, _ = merge_pieces(stack, method=method, rule=rule, model=model)
    compute = common.compute()
    if common.dry_run:
        loras = [lora for lora, _ in stack]
        dtype = common.dtype or joint_dtype(lora.dtype for lora in loras)
        return plan_lora("merge", pieces, rule=rule, dtype=dtype, inputs=loras, compute=compute)
    options = {
        "against": None if against is None else model_record(against),
        **shared_options(common),
        **method_parameters(method.filled(into_lora=True)),
        **rule_options(rule),
    }
    made_by = recipe("merge", loaded.recipe(), options)
    with watching(quiet=common.quiet) as progress:
        merged, report = merge_loras(
            stack,
            method=method,
            rule=sized(rule, common, made_by=made_by),
            against=base,
            compute=compute,
            progress=progress,
        )
    return finish_lora(
        merged,
        report,
        common,
        made_by=made_by,
        inputs=[*loaded.paths, *([Path(against)] if against else [])],
        pieces=pieces,
    )


def _into_model(
    spec: "ModelSpec", loaded: Loaded, presets: "UserPresets", common: Common, method: Method
) -> "Report":
    from lorakit.operations.apply import apply
    from lorakit.operations.plan import plan_model

    allowed, compute = common.allow_unmatched, common.compute()
    base, on_base = open_expression(
        spec, presets=presets, header_only=common.dry_run, allow_unmatched=allowed
    )
    applied, report = apply(
        base, loaded.stack, method=method, allow_unmatched=allowed, compute=compute
    )
    if common.dry_run:
        loras = [lora for lora, _ in loaded.stack]
        return plan_model(report, applied, dtype=common.dtype, inputs=loras, compute=compute)
    options = {
        "into": side_record(spec.path, on_base),
        **shared_options(common),
        **method_parameters(method.filled(into_lora=False)),
    }
    return finish_model(
        applied,
        report,
        common,
        made_by=recipe("merge", loaded.recipe(), options),
        inputs=(*loaded.paths, Path(spec.path), *(Path(lora.path) for lora in spec.loras)),
    )
