"""lorakit cut-blocks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._completion import complete_names, complete_path
from lorakit.cli._guard import guarded
from lorakit.cli._inputs import (
    UserPresets,
    load_stack,
    lora_specs,
    model_record,
    read_presets,
)
from lorakit.cli._options import (
    Common,
    against_option,
    one_of,
    presets_file_option,
    writing_options,
)
from lorakit.cli._progress import watching
from lorakit.cli._write import finish_lora, recipe, shared_options, show
from lorakit.errors import SpecError
from lorakit.names.blocks import block_ids, parse_ids, spelled_out, weights_of
from lorakit.names.elements import parse_elements
from lorakit.names.presets import NAMES

if TYPE_CHECKING:
    from lorakit.names.architectures import Architecture
    from lorakit.names.specs import LoraSpec
    from lorakit.report import Report


class _ListFirst(click.Command):
    """`--list` needs no output: it is answered before the other options are asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Answer --list, else read the options."""
        asked = "--list" in args and not {"-h", "--help"} & set(args)
        if asked and not ctx.resilient_parsing:
            paths = [arg for arg in args if not arg.startswith("-")]
            guarded(_list_blocks)(paths=paths, as_json="--json" in args)
            ctx.exit(0)
        return super().parse_args(ctx, args)


@click.command("cut-blocks", cls=_ListFirst)
@click.argument("lora", shell_complete=complete_path)
@click.option(
    "--preset",
    shell_complete=complete_names(NAMES),
    help="NONE, ALL, INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL, ALL0.5, yours.",
)
@click.option("--weights", metavar="CSV", help="A weight a block: 12, 17, 20, 26, 61 … values.")
@click.option("--keep", metavar="IDS", help="Only these blocks: OUT03-OUT06,MID.")
@click.option("--drop", metavar="IDS", help="All but these blocks.")
@click.option("--elements", metavar="RULES", help="Rules for parts of blocks: IN05-OUT05:attn:0.")
@presets_file_option
@against_option
@click.option("--list", "list_only", is_flag=True, help="Show the file's blocks; needs no output.")
@writing_options
def cut_blocks(
    *,
    lora: str,
    preset: str | None,
    weights: str | None,
    keep: str | None,
    drop: str | None,
    elements: str | None,
    presets_file: Path | None,
    against: str | None,
    list_only: bool,
    common: Common,
) -> None:
    """Delete the blocks that a LoRA does not need, or scale them.

    A weight of 0 deletes the block's layers, so that the file gets smaller; another weight scales
    ΔW once. Blocks that are not named keep 1 with --drop and --elements, and lose all with --keep.
    """
    del list_only
    (spec,) = lora_specs([lora])
    report = make(
        spec,
        given={"preset": preset, "weights": weights, "keep": keep, "drop": drop},
        elements=elements,
        against=against,
        presets=read_presets(presets_file),
        common=common,
    )
    show(common, report)


def make(
    spec: "LoraSpec",
    *,
    given: dict[str, str | None],
    elements: str | None,
    against: str | None,
    presets: UserPresets,
    common: Common,
) -> "Report":
    """Cut a LoRA's blocks as the command does."""
    from lorakit.operations.cut_blocks import cut_blocks as cut
    from lorakit.operations.cut_blocks import cut_pieces
    from lorakit.operations.plan import plan_kept
    from lorakit.tensorfile.source import open_source

    loaded = load_stack(
        [spec], presets={}, header_only=common.dry_run, allow_unmatched=common.allow_unmatched
    )
    file, _ = loaded.stack[0]
    if not elements or any(given.values()):
        one_of(**given)
    if spec != type(spec)(path=spec.path):
        raise SpecError(f"{spec.path}: cut-blocks takes a LoRA without a strength; use --weights.")
    blocks = _blocks(given, file.blocks, presets)
    rules = parse_elements(elements, file.blocks) if elements else ()
    base = None if against is None or common.dry_run else open_source(against)
    with watching(quiet=common.quiet) as progress:
        cut_lora, report = cut(
            file,
            blocks=blocks,
            elements=rules,
            against=base,
            measure=not common.dry_run,
            progress=progress,
        )
    if common.dry_run:
        return plan_kept(report, cut_lora, lora=file, compute=common.compute())
    options = {
        **_lasting(given, presets),
        "elements": elements,
        "against": None if against is None else model_record(against),
        **shared_options(common),
    }
    return finish_lora(
        cut_lora,
        report,
        common,
        made_by=recipe("cut-blocks", loaded.recipe(), options),
        inputs=[*loaded.paths, *([Path(against)] if against else [])],
        pieces=cut_pieces(file, cut_lora, blocks=blocks, elements=rules, against=base),
    )


def _lasting(given: dict[str, str | None], presets: UserPresets) -> dict[str, str | None]:
    """Return what a recipe holds: the vector of a preset of the user's own."""
    name = given["preset"] or ""
    weights = spelled_out(name, presets)
    return given if weights == name else {**given, "preset": None, "weights": weights}


def _blocks(
    given: dict[str, str | None], architecture: "Architecture", presets: UserPresets
) -> dict[str, float]:
    text = given["preset"] or given["weights"]
    if text:
        return dict(weights_of(text, architecture, presets))
    named = given["keep"] or given["drop"]
    if not named:
        return {}
    chosen = set(parse_ids(named, architecture))
    inside, outside = (1.0, 0.0) if given["keep"] else (0.0, 1.0)
    return {block: inside if block in chosen else outside for block in block_ids(architecture)}


def _list_blocks(*, paths: list[str], as_json: bool, verbose: int = 0) -> None:
    from lorakit.cli._render import show_table
    from lorakit.cli.inspect import blocks_table
    from lorakit.operations.inspect import inspect

    del verbose
    if len(paths) != 1:
        raise SpecError(f"cut-blocks --list takes one LoRA, found {len(paths)}.")
    found = inspect(paths[0], blocks=True)
    if as_json:
        click.echo(json.dumps(found.as_dict(), sort_keys=True))
        return
    show_table(blocks_table(found.blocks))
