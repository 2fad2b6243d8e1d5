"""lorakit resize."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._completion import complete_names, complete_path
from lorakit.cli._inputs import load_stack, lora_specs, model_record
from lorakit.cli._options import Common, rank_options, writing_options
from lorakit.cli._progress import watching
from lorakit.cli._shell import files_argument
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
from lorakit.names.tags import composed

if TYPE_CHECKING:
    from lorakit.linalg.ranks import RankRule
    from lorakit.names.specs import LoraSpec
    from lorakit.operations.yardsticks import Yardstick
    from lorakit.report import Report

SCORES = ("spn-ckpt", "fro-ckpt", "subspace", "spn-lora", "fro-lora")
_SCORE_OPTIONS: tuple[Callable[..., Callable[..., None]], ...] = (
    click.option(
        "--against",
        metavar="MODEL",
        shell_complete=complete_path,
        help="The model whose weights directions are scored by; also what DoRA, OFT, GLoRA and "
        "IA3 are taken on.",
    ),
    click.option(
        "--score",
        metavar="NAME",
        shell_complete=complete_names(SCORES),
        help="What a direction's σ is divided by: spn-ckpt or fro-ckpt, the spectral or Frobenius "
        "norm of the model's layer; subspace, what that layer does along the direction; spn-lora "
        "or fro-lora, a norm of the LoRA's own layer; or several with weights: "
        "fro-ckpt=0.8,spn-lora=0.2. If left out, --threshold and --size take fro-ckpt where "
        "--against names a model.",
    ),
    click.option(
        "--threshold",
        type=float,
        metavar="X",
        help="Directions with log10(σ / reference) of at least this; about -3.5 for fro-ckpt, "
        "-1.2 for spn-ckpt.",
    ),
    click.option(
        "--rescale",
        type=float,
        default=1.0,
        show_default=True,
        metavar="X",
        help="Multiply the change by this, for the score and in the file.",
    ),
)


def _score_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SCORE_OPTIONS):
        command = option(command)
    return command


@click.command()
@files_argument("loras", "LORA...", complete=complete_path)
@_score_options
@writing_options
@rank_options
def resize(
    *,
    loras: tuple[str, ...],
    against: str | None,
    score: str | None,
    threshold: float | None,
    rescale: float,
    rule: "RankRule",
    common: Common,
) -> None:
    """Give LoRAs another rank: the best approximation, from the factors alone.

    With several LORA the output is a folder. One rank rule is needed: --rank, --energy, --error,
    --sv-ratio, --sv-sum, --size or --threshold; --rank beside another rule is a cap.

    Where --against names a model, --threshold and --size rank directions by what they do to it: a
    change counts for little in a layer whose weights are large. --size spends bytes where the
    square of σ / reference is largest a byte, over all layers at once.
    """
    rule = rule if threshold is None else replace(rule, threshold=threshold)
    if rule.exact:
        raise SpecError(
            "resize needs a rank rule, found none; give --rank, --energy, --size or, with "
            "--against, --threshold."
        )
    specs = lora_specs(loras)
    one = partial(make, rule=rule, against=against, score=score, rescale=rescale, common=common)
    if len(specs) == 1 and not common.output.is_dir():
        show(common, one(specs[0], common.output))
        return
    names = [Path(spec.path).stem + ".safetensors" for spec in specs]
    # Windows and macOS take names that differ in case or in how letters are composed for one.
    plain = [composed(name).casefold() for name in names]
    twice = sorted({name for name, key in zip(names, plain, strict=True) if plain.count(key) > 1})
    if twice:
        raise SpecError(f"Two inputs are called {twice[0]}; resize them one at a time.")
    if common.output.is_file():
        raise SpecError(f"{common.output}: expected a folder for several LoRAs, found a file.")
    outputs = [common.output / name for name in names]
    shared = _yardsticks(specs, rule, against, score, rescale, common)
    reports = [
        one(spec, output, yardstick=yardstick)
        for spec, output, yardstick in zip(specs, outputs, shared, strict=True)
    ]
    show(common, *reports)


def _yardsticks(
    specs: "Sequence[LoraSpec]",
    rule: "RankRule",
    against: str | None,
    score: str | None,
    rescale: float,
    common: Common,
) -> "Sequence[Yardstick | None]":
    """Read the model once for all LoRAs; of norms their headers say which layers."""
    from lorakit.operations.resize import yardsticks
    from lorakit.operations.yardsticks import chosen_score, is_directional
    from lorakit.tensorfile.source import open_source

    chosen = chosen_score(score, rule, against=against is not None)
    if chosen is None or against is None or common.dry_run:
        return [None for _ in specs]
    loras = [
        load_stack(
            [spec],
            presets={},
            header_only=not is_directional(chosen),
            allow_unmatched=common.allow_unmatched,
        ).stack[0][0]
        for spec in specs
    ]
    with watching(quiet=common.quiet) as progress:
        return yardsticks(
            loras,
            score=chosen,
            against=open_source(against),
            rescale=rescale,
            allow_unmatched=common.allow_unmatched,
            compute=common.compute(),
            progress=progress,
        )


def make(
    spec: "LoraSpec",
    output: Path,
    *,
    rule: "RankRule",
    against: str | None,
    common: Common,
    score: str | None = None,
    rescale: float = 1.0,
    yardstick: "Yardstick | None" = None,
) -> "Report":
    """Resize one LoRA as the command does; the yardstick is one that several share."""
    from lorakit.models import open_model
    from lorakit.operations.plan import plan_lora
    from lorakit.operations.resize import resize as resize_lora
    from lorakit.operations.resize import resize_pieces
    from lorakit.operations.yardsticks import check_matched, chosen_score
    from lorakit.tensorfile.source import open_source

    if spec != type(spec)(path=spec.path):
        raise SpecError(f"{spec.path}: resize takes a LoRA without a strength; merge it first.")
    chosen = chosen_score(score, rule, against=against is not None)
    loaded = load_stack(
        [spec], presets={}, header_only=common.dry_run, allow_unmatched=common.allow_unmatched
    )
    ((lora, _),) = stored_as(loaded.stack, common)
    base = None if against is None else open_source(against)
    model = None if base is None else open_model(base)
    pieces = resize_pieces(lora, model=model, rescale=rescale)
    compute = common.compute()
    if common.dry_run:
        check_matched(lora, pieces, model, score=chosen, allowed=common.allow_unmatched)
        return plan_lora(
            "resize", pieces, rule=rule, dtype=lora.dtype, inputs=[lora], compute=compute
        )
    options = {
        "against": None if against is None else model_record(against),
        "score": chosen,
        "rescale": None if rescale == 1.0 else rescale,
        **shared_options(common),
        **rule_options(rule),
    }
    made_by = recipe("resize", loaded.recipe(), options)
    with watching(quiet=common.quiet) as progress:
        resized, report = resize_lora(
            lora,
            rule=sized(rule, common, made_by=made_by),
            against=base,
            score=yardstick or chosen,
            rescale=rescale,
            allow_unmatched=common.allow_unmatched,
            compute=compute,
            progress=progress,
        )
    return finish_lora(
        resized,
        report,
        common,
        made_by=made_by,
        inputs=[*loaded.paths, *([Path(against)] if against else [])],
        pieces=pieces,
        output=output,
    )
