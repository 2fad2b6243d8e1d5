"""lorakit compare."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._compare_view import show_comparison
from lorakit.cli._completion import complete_sum
from lorakit.cli._guard import guarded
from lorakit.cli._inputs import (
    load_stack,
    lora_specs,
    lora_sum,
    model_spec,
    name_of,
    open_expression,
    read_presets,
)
from lorakit.cli._options import Size, against_option, device_option, presets_file_option
from lorakit.cli._pages import keep_pages
from lorakit.cli._progress import watching
from lorakit.cli._shell import files_argument
from lorakit.cli._sides import is_lora
from lorakit.errors import SpecError
from lorakit.names.specs import format_lora

if TYPE_CHECKING:
    from lorakit.cli._inputs import UserPresets
    from lorakit.compute import Compute
    from lorakit.names.specs import ModelSpec
    from lorakit.operations.comparison import Comparison


@click.command()
@files_argument("inputs", "A B...", complete=complete_sum)
@presets_file_option
@against_option
@click.option("--rank", type=click.IntRange(min=1), help="Tell what this rank keeps of the sum.")
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="Workers; a core each if left out.")
@click.option("--memory", type=Size(), help="Bytes in flight at once, such as 256M or 2G.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="The advice alone, and no progress.")
@click.option("-v", "--verbose", count=True, help="A row a layer too; -vv shows tracebacks.")
@guarded
def compare(
    *,
    inputs: tuple[str, ...],
    presets_file: Path | None,
    against: str | None,
    rank: int | None,
    device: str,
    threads: int | None,
    memory: int | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Compare LoRAs, or models: norms, angles, shared directions, conflicts, and what follows.

    LoRAs take strengths as in merge. Of three models or more the changes from the first are
    compared. The last line says whether one is a merge of the others, whichever it is, and of
    which weights, by block too; what a cut or a lower rank left of one; or whether two fight.
    """
    keep_pages()
    presets = read_presets(presets_file)
    kinds = [_is_lora(text) for text in inputs]
    if len(set(kinds)) > 1:
        raise SpecError(
            f"{inputs[kinds.index(True)]} is a LoRA and {inputs[kinds.index(False)]} a model; "
            "compare LoRAs with LoRAs, models with models."
        )
    from lorakit.compute import Compute

    compute = Compute.of(device=device, threads=threads, memory=memory)
    if kinds[0]:
        found = _loras(inputs, presets, against, rank, compute, quiet=quiet or as_json)
    elif rank is not None or against is not None:
        raise SpecError("--rank and --against belong to LoRAs; with models leave them out.")
    else:
        found = _models(inputs, presets, compute, quiet=quiet or as_json)
    if as_json:
        click.echo(json.dumps(found.as_dict(), sort_keys=True))
    else:
        show_comparison(found, quiet=quiet, verbose=verbose)


def _is_lora(text: str) -> bool:
    return text.lstrip().startswith("<lora:") or is_lora(lora_sum(text)[0].path)


def _loras(
    inputs: Sequence[str],
    presets: "UserPresets",
    against: str | None,
    rank: int | None,
    compute: "Compute",
    *,
    quiet: bool,
) -> "Comparison":
    from lorakit.linalg.ranks import RankRule
    from lorakit.operations.compare import compare as compare_loras
    from lorakit.tensorfile.source import open_source

    loaded = load_stack(lora_specs(inputs), presets=presets)
    with watching(quiet=quiet) as progress:
        return compare_loras(
            loaded.stack,
            rule=None if rank is None else RankRule(rank=rank),
            against=None if against is None else open_source(against),
            compute=compute,
            progress=progress,
        )


def _models(
    inputs: Sequence[str], presets: "UserPresets", compute: "Compute", *, quiet: bool
) -> "Comparison":
    from lorakit.operations.compare_models import compare_models

    specs = [model_spec(text) for text in inputs]
    sources = [open_expression(spec, presets=presets)[0] for spec in specs]
    names = [_named(spec) for spec in specs]
    with watching(quiet=quiet) as progress:
        return compare_models(sources, names=names, compute=compute, progress=progress)


def _named(spec: "ModelSpec") -> str:
    """Return what to call a model: its path, or its name and those of the LoRAs on it."""
    if not spec.loras:
        return spec.path
    loras = [format_lora(replace(lora, path=_stem(lora.path))) for lora in spec.loras]
    return "+".join([_stem(spec.path), *loras])


def _stem(path: str) -> str:
    return name_of(path).removesuffix(".safetensors")
