"""lorakit merge."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._inputs import (
    Loaded,
    load_stack,
    lora_specs,
    model_spec,
    open_expression,
    read_presets,
)
from lorakit.cli._options import (
    Common,
    against_option,
    presets_file_option,
    rank_options,
    writing_options,
)
from lorakit.cli._progress import watching
from lorakit.cli._write import finish_lora, finish_model, recipe, rule_options, show
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.cli._inputs import UserPresets
    from lorakit.linalg.ranks import RankRule
    from lorakit.report import Report


@click.command()
@click.argument("loras", nargs=-1, metavar="LORA...")
@click.option("--into", metavar="MODEL", help="Bake the stack into this checkpoint.")
@click.option(
    "--method",
    type=click.Choice(("linear",)),
    default="linear",
    show_default=True,
    help="How the LoRAs are combined: linear is Σ strength · ΔW, exactly.",
)
@click.option("--prompt", help="Take all <lora:…> tags of this prompt.")
@click.option(
    "--lora-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the files of the tags are; the current folder if left out.",
)
@presets_file_option
@against_option
@writing_options
@rank_options
def merge(
    *,
    loras: tuple[str, ...],
    into: str | None,
    method: str,
    prompt: str | None,
    lora_dir: Path | None,
    presets_file: Path | None,
    against: str | None,
    rule: "RankRule",
    common: Common,
) -> None:
    """Merge LoRAs into one LoRA, or bake them into a checkpoint with --into.

    LORA is PATH[:STRENGTH][:te=S][:unet=S][:lbw=PRESET|CSV], or a web UI tag
    "<lora:style:0.8:lbw=OUTALL>". Strengths are linear and may be negative.
    """
    presets = read_presets(presets_file)
    specs = lora_specs(loras, prompt=prompt, lora_dir=lora_dir)
    loaded = load_stack(
        specs,
        presets=presets,
        header_only=common.dry_run,
        allow_unmatched=common.allow_unmatched,
    )
    if into is None:
        show(common, _into_lora(loaded, rule, common, method, against))
        return
    if against is not None:
        raise SpecError("--into names the model already; leave --against out.")
    if not rule.exact:
        raise SpecError("Rank rules shape a LoRA; with --into there is none, leave them out.")
    show(common, _into_model(into, loaded, presets, common, method))


def _into_lora(
    loaded: Loaded, rule: "RankRule", common: Common, method: str, against: str | None
) -> "Report":
    from lorakit.lorafile import joint_dtype
    from lorakit.models import open_model
    from lorakit.operations.merge import merge as merge_loras
    from lorakit.operations.merge import merge_pieces
    from lorakit.operations.plan import plan_lora
    from lorakit.tensorfile.source import open_source

    stack = loaded.stack
    base = None if against is None else open_source(against)
    pieces, _ = merge_pieces(stack, model=None if base is None else open_model(base))
    compute = common.compute()
    if common.dry_run:
        loras = [lora for lora, _ in stack]
        dtype = common.dtype or joint_dtype(lora.dtype for lora in loras)
        return plan_lora("merge", pieces, rule=rule, dtype=dtype, inputs=loras, compute=compute)
    with watching(quiet=common.quiet) as progress:
        merged, report = merge_loras(
            stack, rule=rule, against=base, compute=compute, progress=progress
        )
    name = None if against is None else Path(against).name
    options = {"method": method, "against": name, "dtype": common.dtype, **rule_options(rule)}
    return finish_lora(
        merged,
        report,
        common,
        made_by=recipe("merge", loaded.recipe(), options),
        inputs=[*loaded.paths, *([Path(against)] if against else [])],
        pieces=pieces,
    )


def _into_model(
    into: str, loaded: Loaded, presets: "UserPresets", common: Common, method: str
) -> "Report":
    from lorakit.operations.apply import apply
    from lorakit.operations.plan import plan_model

    spec = model_spec(into)
    allowed, compute = common.allow_unmatched, common.compute()
    base = open_expression(
        spec, presets=presets, header_only=common.dry_run, allow_unmatched=allowed
    )
    applied, report = apply(base, loaded.stack, allow_unmatched=allowed, compute=compute)
    if common.dry_run:
        loras = [lora for lora, _ in loaded.stack]
        return plan_model(report, applied, dtype=common.dtype, inputs=loras, compute=compute)
    options = {"into": Path(spec.path).name, "method": method, "dtype": common.dtype}
    return finish_model(
        applied,
        report,
        common,
        made_by=recipe("merge", loaded.recipe(), options),
        inputs=(*loaded.paths, Path(spec.path), *(Path(lora.path) for lora in spec.loras)),
    )
