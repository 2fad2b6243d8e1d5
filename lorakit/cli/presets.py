"""lorakit presets."""

import json
from pathlib import Path

import click

from lorakit.cli._guard import guarded
from lorakit.cli._inputs import read_presets
from lorakit.cli._options import presets_file_option
from lorakit.names.blocks import block_ids, fits, weights_of
from lorakit.names.families import ARCHITECTURES
from lorakit.names.presets import preset_names


@click.command()
@presets_file_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("-v", "--verbose", count=True, help="-vv shows tracebacks.")
@guarded
def presets(*, presets_file: Path | None, as_json: bool, verbose: int) -> None:
    """List the block presets, as each architecture resolves them."""
    del verbose
    own = read_presets(presets_file)
    found = {
        architecture.id: {
            name: weights_of(name, architecture, own)
            for name in (*preset_names(architecture), *own)
            if name not in own or fits(own[name], architecture)
        }
        for architecture in ARCHITECTURES
    }
    if as_json:
        click.echo(json.dumps({"schema": 1, "command": "presets", "presets": found}))
        return
    for architecture in ARCHITECTURES:
        click.echo(f"{architecture.title}: {' '.join(block_ids(architecture))}")
        for name, weights in found[architecture.id].items():
            click.echo(f"  {name:10} {_line(weights)}")


def _line(weights: dict[str, float]) -> str:
    values = set(weights.values())
    if len(values) == 1:
        return f"{values.pop():g} everywhere"
    return " ".join(
        block if weight == 1 else f"{block}:{weight:g}"
        for block, weight in weights.items()
        if weight
    )
