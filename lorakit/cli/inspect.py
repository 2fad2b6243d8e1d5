"""lorakit inspect."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click
from rich.table import Table

from lorakit.cli._guard import guarded
from lorakit.cli._render import bytes_text, results, share_text

if TYPE_CHECKING:
    from lorakit.operations.inspect import Block, Inspection

PLAIN = {
    "ss_output_name": "name",
    "modelspec.title": "title",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "network",
    "ss_network_dim": "network dim",
    "ss_network_alpha": "network alpha",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_num_epochs": "epochs",
    "ss_steps": "steps",
    "ss_num_train_images": "images",
    "ss_resolution": "resolution",
    "ss_clip_skip": "clip skip",
    "ss_training_comment": "comment",
    "sshs_model_hash": "hash (AutoV3)",
}
BAR = 24


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--blocks", is_flag=True, help="Norm, share of the energy, effective rank by block.")
@click.option("--metadata", is_flag=True, help="All metadata, as it is stored.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout: an object, or a list.")
@click.option("-v", "--verbose", count=True, help="-vv shows tracebacks.")
@guarded
def inspect(
    *, paths: tuple[str, ...], blocks: bool, metadata: bool, as_json: bool, verbose: int
) -> None:
    """Say what a LoRA or a checkpoint is: kind, architecture, names, ranks, blocks, metadata."""
    from lorakit.operations.inspect import inspect as look

    del verbose
    found = [look(path, blocks=blocks) for path in paths]
    if as_json:
        bodies = [one.as_dict() for one in found]
        click.echo(json.dumps(bodies[0] if len(bodies) == 1 else bodies, sort_keys=True))
        return
    console = results()
    for one in found:
        console.print(_facts(one))
        if blocks and one.blocks:
            console.print(blocks_table(one.blocks))
        if metadata:
            console.print(_pairs(dict(sorted(one.metadata.items()))))


def _facts(found: "Inspection") -> Table:
    facts = {
        "file": found.path,
        "kind": _counts(found.adapters) if found.adapters else found.kind,
        "architecture": found.architecture or "not known",
        "names": found.layout,
        "layers": f"{found.layers} ({_counts(found.components)})",
        "ranks": _counts(found.ranks),
        "alphas": _counts(found.alphas),
        "dtypes": _counts(found.dtypes),
        "size": f"{bytes_text(found.nbytes)} in {found.tensors} tensors",
        "blocks": " ".join(block.id for block in found.blocks),
        "not known": f"{len(found.unclaimed)} tensors" if found.unclaimed else "",
        "not measured": _unmeasured(found),
        "dead layers": str(len(found.dead)) if found.dead else "",
        "made by": _made_by(found.metadata),
    }
    for key, name in PLAIN.items():
        if found.metadata.get(key, "None") not in ("None", ""):
            facts[name] = found.metadata[key]
    return _pairs({name: value for name, value in facts.items() if value})


def _unmeasured(found: "Inspection") -> str:
    """Say why some layers have no norm."""
    count = len(found.unmeasured)
    return f"{count} layers, whose change depends on the model" if count else ""


def _made_by(metadata: Mapping[str, str]) -> str:
    try:
        recipe = json.loads(metadata.get("lorakit.recipe", "null"))
    except ValueError:
        return ""
    if not isinstance(recipe, dict):
        return ""
    return f"lorakit {recipe.get('lorakit', '')} {recipe.get('command', '')}"


def _counts(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value}: {count}" for value, count in counts.items())


def _pairs(values: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, value)
    return table


def blocks_table(blocks: "tuple[Block, ...]") -> Table:
    """Return the table of blocks, a bar for each share."""
    table = Table(box=None, pad_edge=False)
    for title in ("block", "layers", "norm", "share", "effective rank", "dead"):
        table.add_column(title, justify="left" if title == "block" else "right")
    table.add_column("")
    largest = max((block.share or 0.0 for block in blocks), default=0.0)
    for block in blocks:
        bar = round(BAR * (block.share or 0.0) / largest) if largest else 0
        table.add_row(
            block.id,
            str(block.layers),
            "" if block.norm is None else f"{block.norm:.4g}",
            share_text(block.share),
            "" if block.effective_rank is None else f"{block.effective_rank:.1f}",
            str(block.dead) if block.dead else "",
            "#" * bar,
        )
    return table
