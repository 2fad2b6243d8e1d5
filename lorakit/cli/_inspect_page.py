"""What inspect found, as a page and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli._inspect_view import (
    MEASURES,
    RELATIVE,
    SHARE,
    advice,
    cell_text,
    facts,
    file_names,
    heat_of,
    most_of,
    short_kinds,
)
from lorakit.cli._words import in_words, label, said
from lorakit.errors import SpecError
from lorakit.pictures.chart import Chart, Line, chart
from lorakit.pictures.heatmap import Cell, Heatmap, heatmap
from lorakit.pictures.html import Section, Table, page
from lorakit.pictures.svg import Picture, below, beside, document
from lorakit.pictures.svg import label as text_label
from lorakit.pictures.text import BOLD, SIZE, TITLE, cut, width, wrapped
from lorakit.tensorfile.copying import write_all
from lorakit.tensorfile.replacing import check_file, check_space, replaced_file

if TYPE_CHECKING:
    from lorakit.operations.inspection import Group, Inspection

SHOWN = ("kind", "architecture", "names", "layers", "ranks", "alphas", "size", "faults", "made by")
"""Facts that a picture has room for."""
PANEL = 460
LINE = 18
_COLUMN = 96.0
_ROOM = PANEL - _COLUMN


def check_outputs(
    html: Path | None, svg: Path | None, *, overwrite: bool, inputs: Sequence[Path]
) -> dict[Path, Path]:
    """Check that the outputs may be written, before anything is read.

    Args:
        html: the page.
        svg: the picture.
        overwrite: replace existing ones.
        inputs: never replaced.

    Returns:
        What to write -> where it really is.

    Raises:
        SpecError: a name does not say what the file is.
        OutputError: an output exists, or is an input.
    """
    places = {}
    for path, suffixes in ((html, (".html", ".htm")), (svg, (".svg",))):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise SpecError(f"{path}: expected a name ending in {suffixes[0]}.")
        places[path] = check_file(path, overwrite=overwrite, inputs=inputs)
    return places


def write_text(place: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    # A file's name may hold bytes that are no text.
    data = text.encode(errors="replace")
    check_space(place, place, len(data))
    with replaced_file(place) as file:
        write_all(file, data)


def as_html(found: "Sequence[Inspection]") -> str:
    """Return a page that needs no other file, the LoRAs side by side."""
    return page(f"lorakit inspect: {file_names(found)}", [_section(one, found) for one in found])


def as_svg(found: "Sequence[Inspection]") -> str:
    """Return one picture, the LoRAs side by side."""
    panels = beside([_panel(one, found) for one in found])
    return document(panels, f"lorakit inspect: {file_names(found)}")


def _section(one: "Inspection", all_: "Sequence[Inspection]") -> Section:
    maps = [_map(one, measure, all_) for measure in MEASURES if _has(one, measure)]
    told = {name: text for name, text in facts(one).items() if name != "faults" or not one.faults}
    return Section(
        title=file_names([one]),
        facts=told,
        remarks=(*(one.faults or ()), *([advice(one)] if one.spectrum else [])),
        pictures=(*maps[:1], *_curves(one, all_), *maps[1:]),
        tables=(*_needed(one), *_metadata(one.metadata)),
    )


def _has(one: "Inspection", measure: str) -> bool:
    value = MEASURES[measure][0]
    return any(value(group) is not None for groups in one.cells.values() for group in groups)


def _map(one: "Inspection", measure: str, all_: "Sequence[Inspection]") -> Picture:
    """Draw blocks and kinds; one scale of colours for all the files."""
    kinds = short_kinds(one)
    most = max(most_of(other, measure) for other in all_)
    rows = {}
    for block in one.blocks:
        inside = {group.id: group for group in one.cells.get(block.id, ())}
        row = {
            short: _cell(inside[kind], f"{block.id} {short}", measure, most)
            for kind, short in kinds.items()
            if kind in inside
        }
        rows[block.id] = {**row, "all": _sum(block, block.id, measure)}
    sums = {kinds[kind.id]: _sum(kind, kinds[kind.id], measure) for kind in one.kinds}
    title = measure[0].upper() + measure[1:]
    return heatmap(
        Heatmap(title=title, columns=(*kinds.values(), "all"), rows={**rows, "all": sums})
    )


def _cell(group: "Group", name: str, measure: str, most: float) -> Cell:
    heat = heat_of(group, measure, most)
    return Cell(text=cell_text(group, measure), heat=heat, tip=_tip(group, name))


def _sum(group: "Group", name: str, measure: str) -> Cell:
    return Cell(text=cell_text(group, measure), tip=_tip(group, name))


def _tip(group: "Group", name: str) -> str:
    told = [f"{name}: {group.layers} layers"]
    for measure, (value, _) in MEASURES.items():
        if value(group) is not None:
            told.append(f"{measure} {cell_text(group, measure)}")
    if group.dead:
        told.append(f"{group.dead} dead")
    return ", ".join(told)


def _curves(one: "Inspection", all_: "Sequence[Inspection]") -> tuple[Picture, ...]:
    spectrum = one.spectrum
    if spectrum is None or not spectrum.ranks:
        return ()
    curves = (*spectrum.blocks, spectrum.total)
    lines = tuple(
        Line(
            name=f"{curve.id}: {_needs(curve.needed)}",
            points=tuple(zip(spectrum.ranks, curve.kept, strict=True)),
            main=curve is spectrum.total,
        )
        for curve in curves
    )
    total = spectrum.total
    marks = tuple(
        (rank, total.kept[spectrum.ranks.index(rank)], f"{goal} % at rank {rank}")
        for goal, rank in total.needed.items()
        if rank in spectrum.ranks
    )
    most = max(
        other.spectrum.ranks[-1] for other in all_ if other.spectrum and other.spectrum.ranks
    )
    drawn = chart(
        Chart(
            title="Energy kept when every layer is cut to a rank",
            axis="rank (thick: the whole, thin: each block)",
            lines=lines,
            marks=marks,
            note=f"Dots: {_needs(total.needed)}",
            most=most,
        ),
        wide=PANEL,
    )
    return (drawn,)


def _needs(needed: Mapping[str, int]) -> str:
    return ", ".join(f"{goal} % at rank {rank}" for goal, rank in needed.items())


def _needed(one: "Inspection") -> tuple[Table, ...]:
    if one.spectrum is None:
        return ()
    goals = tuple(one.spectrum.total.needed)
    rows = tuple(
        (curve.id, str(curve.rank), *(str(curve.needed[goal]) for goal in goals))
        for curve in (*one.spectrum.blocks, one.spectrum.total)
    )
    columns = ("block", "rank now", *(f"{goal} %" for goal in goals))
    return (Table(title="Which rank keeps how much", columns=columns, rows=rows),)


def _metadata(metadata: Mapping[str, str]) -> tuple[Table, ...]:
    rows = tuple(
        (label(key), in_words(key, text)) for key, text in sorted(metadata.items()) if said(text)
    )
    if not rows:
        return ()
    return (Table(title="What the file says of itself", columns=("what", "value"), rows=rows),)


def _panel(one: "Inspection", all_: "Sequence[Inspection]") -> Picture:
    maps = [_map(one, measure, all_) for measure in (SHARE, RELATIVE) if _has(one, measure)]
    parts = [_head(one), *maps, *_curves(one, all_)]
    return below(parts)


def _head(one: "Inspection") -> Picture:
    """Write a file's name, its facts and the advice, as wide as a panel."""
    title = cut(file_names([one]), PANEL / BOLD, TITLE)
    body, y = [text_label(title, 0, 14, kind="title", told=one.path)], 20.0
    told = facts(one)
    lines = [(name, told[name]) for name in SHOWN if name in told]
    for name, text in [*lines, ("rank", advice(one))]:
        said = [line for part in text.split("\n") for line in wrapped(part, _ROOM, lines=3)]
        for place, line in enumerate(said):
            y += LINE
            if not place:
                body.append(text_label(name, 0, y, kind="muted"))
            body.append(text_label(line, _COLUMN, y))
    return Picture(width=max(PANEL, width(title, TITLE)), height=y + SIZE / 2, body="".join(body))
