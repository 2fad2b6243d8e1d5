"""lorakit inspect."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli._completion import complete_path
from lorakit.cli._guard import guarded
from lorakit.cli._inspect_view import (
    SPECTRUM,
    blocks_table,
    facts,
    heat_table,
    metadata_table,
    pairs,
    spectrum_table,
)
from lorakit.cli._inspect_words import advice, summary
from lorakit.cli._measures import NORM, RANK, RELATIVE, SHARE
from lorakit.cli._render import results, say, show_table
from lorakit.cli._shell import Named, files_argument
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.operations.inspection import Inspection
    from lorakit.tensorfile.source import TensorSource

__all__ = ["blocks_table", "inspect"]


@click.command()
@files_argument("paths", "PATH...", complete=complete_path)
@click.option(
    "--blocks",
    is_flag=True,
    help="A map of blocks and kinds of layers: share of the change, norm, effective rank.",
)
@click.option(
    "--spectrum", is_flag=True, help="Which dim does it need: the energy that each rank keeps."
)
@click.option(
    "--against",
    metavar="MODEL",
    shell_complete=complete_path,
    help="‖ΔW‖ / ‖W‖ in this model; DoRA, OFT, GLoRA and IA3 are taken on it.",
)
@click.option("--metadata", is_flag=True, help="All that the metadata says, in plain words.")
@click.option(
    "--html",
    type=Named(path_type=Path, dir_okay=False),
    help="Write all of it as a page that needs no other file.",
)
@click.option(
    "--svg",
    type=Named(path_type=Path, dir_okay=False),
    help="Write the map and the spectrum as a picture.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing page or picture.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout: an object, or a list.")
@click.option(
    "-v", "--verbose", count=True, help="Maps of norms and ranks too; -vv shows tracebacks."
)
@guarded
def inspect(
    *,
    paths: tuple[str, ...],
    blocks: bool,
    spectrum: bool,
    against: str | None,
    metadata: bool,
    html: Path | None,
    svg: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: int,
) -> None:
    """Say what a LoRA or a checkpoint is: kind, architecture, names, ranks, blocks, metadata.

    The header alone answers, at once. --blocks, --spectrum, --against, --html and --svg read the
    tensors of LoRAs too.
    """
    inputs = [Path(path) for path in (*paths, *([against] if against else []))]
    places = _checked(html, svg, overwrite=overwrite, inputs=inputs)
    found = _look(paths, blocks=blocks, spectrum=spectrum, against=against, drawn=bool(places))
    for path, target in places.items():
        _draw(found, target, html=path == html)
    if as_json:
        bodies = [one.as_dict() for one in found]
        click.echo(json.dumps(bodies[0] if len(bodies) == 1 else bodies, sort_keys=True))
        return
    for place, one in enumerate(found):
        if place:
            click.echo()
        _show(one, blocks=blocks or against is not None, spectrum=spectrum, verbose=verbose)
        if metadata:
            click.echo()
            show_table(metadata_table(one.metadata), folded=True)
    for path in places:
        click.echo(f"written: {path}")


def _checked(
    html: Path | None, svg: Path | None, *, overwrite: bool, inputs: list[Path]
) -> dict[Path, Path]:
    if html is None and svg is None:
        return {}
    from lorakit.cli._inspect_page import check_outputs

    return check_outputs(html, svg, overwrite=overwrite, inputs=inputs)


def _look(
    paths: tuple[str, ...], *, blocks: bool, spectrum: bool, against: str | None, drawn: bool
) -> "list[Inspection]":
    from lorakit.operations.inspect import inspect as look

    found = [look(path) for path in paths]
    if not (blocks or spectrum or against or drawn):
        return found
    from lorakit.cli._pages import keep_pages

    keep_pages()
    base = None if against is None else _model(against)
    # A page of several files may hold checkpoints too, which have no spectrum.
    return [
        one
        if one.kind == "checkpoint" and not (spectrum or against)
        else look(one.path, blocks=True, spectrum=spectrum or drawn, against=base)
        for one in found
    ]


def _model(path: str) -> "TensorSource":
    from lorakit.names.lorakeys import holds_lora
    from lorakit.tensorfile.source import open_source

    source = open_source(path)
    if holds_lora(source.specs):
        raise SpecError(f"{path}: --against takes a model, found a LoRA; see lorakit compare.")
    return source


def _draw(found: "list[Inspection]", place: Path, *, html: bool) -> None:
    from lorakit.cli._inspect_page import as_html, as_svg, write_text

    write_text(place, as_html(found) if html else as_svg(found))


def _show(one: "Inspection", *, blocks: bool, spectrum: bool, verbose: int) -> None:
    say(" ".join(summary(one)))
    if command := advice(one):
        click.echo(f"  {command}")
    click.echo()
    show_table(pairs(facts(one)), folded=True)
    if blocks and one.blocks:
        _show_maps(one, verbose=verbose)
    if spectrum and one.spectrum is not None:
        _title(SPECTRUM)
        show_table(spectrum_table(one.spectrum))


def _show_maps(one: "Inspection", *, verbose: int) -> None:
    if not one.cells:
        show_table(blocks_table(one.blocks))
        return
    more = [NORM, RANK] if verbose else []
    if verbose and one.against is not None:
        more.append(RELATIVE)
    for measure in (SHARE, *more):
        _title(measure.title)
        show_table(heat_table(one, measure))


def _title(text: str) -> None:
    click.echo()
    results().print(text, style="bold", soft_wrap=True)
