"""lorakit resize."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._inputs import load_stack, lora_specs
from lorakit.cli._options import Common, against_option, rank_options, writing_options
from lorakit.cli._progress import watching
from lorakit.cli._write import finish_lora, recipe, rule_options, show
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.linalg.ranks import RankRule
    from lorakit.names.specs import LoraSpec
    from lorakit.report import Report


@click.command()
@click.argument("loras", nargs=-1, required=True, metavar="LORA...")
@against_option
@writing_options
@rank_options
def resize(
    *, loras: tuple[str, ...], against: str | None, rule: "RankRule", common: Common
) -> None:
    """Give LoRAs another rank: the best approximation, from the factors alone.

    With several LORA the output is a folder. One rank rule is needed: --rank, --energy, --error,
    --sv-ratio, --sv-sum or --size; --rank beside another rule is a cap.
    """
    if rule.exact:
        raise SpecError("resize needs a rank rule, found none; give --rank, --energy or --size.")
    specs = lora_specs(loras)
    if len(specs) == 1 and not common.output.is_dir():
        show(common, _resize_one(specs[0], common.output, rule, common, against))
        return
    names = [Path(spec.path).stem + ".safetensors" for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"Two inputs are called {twice[0]}; resize them one at a time.")
    if common.output.is_file():
        raise SpecError(f"{common.output}: expected a folder for several LoRAs, found a file.")
    outputs = [common.output / name for name in names]
    reports = [
        _resize_one(spec, output, rule, common, against)
        for spec, output in zip(specs, outputs, strict=True)
    ]
    show(common, *reports)


def _resize_one(
    spec: "LoraSpec", output: Path, rule: "RankRule", common: Common, against: str | None
) -> "Report":
    from lorakit.models import open_model
    from lorakit.operations.merge import merge_pieces
    from lorakit.operations.plan import plan_lora
    from lorakit.operations.resize import resize as resize_lora
    from lorakit.tensorfile.source import open_source

    if spec != type(spec)(path=spec.path):
        raise SpecError(f"{spec.path}: resize takes a LoRA without a strength; merge it first.")
    loaded = load_stack(
        [spec], presets={}, header_only=common.dry_run, allow_unmatched=common.allow_unmatched
    )
    lora = loaded.stack[0][0]
    base = None if against is None else open_source(against)
    pieces, _ = merge_pieces([(lora, 1.0)], model=None if base is None else open_model(base))
    compute = common.compute()
    if common.dry_run:
        dtype = common.dtype or lora.dtype
        return plan_lora("resize", pieces, rule=rule, dtype=dtype, inputs=[lora], compute=compute)
    with watching(quiet=common.quiet) as progress:
        resized, report = resize_lora(
            lora, rule=rule, against=base, compute=compute, progress=progress
        )
    name = None if against is None else Path(against).name
    options = {"against": name, "dtype": common.dtype, **rule_options(rule)}
    return finish_lora(
        resized,
        report,
        common,
        made_by=recipe("resize", loaded.recipe(), options),
        inputs=[*loaded.paths, *([Path(against)] if against else [])],
        pieces=pieces,
        output=output,
    )
