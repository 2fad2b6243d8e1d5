"""What inspect found, as a page and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli._inspect_view import facts
from lorakit.cli._inspect_words import advice, file_name, file_names, summary
from lorakit.cli._measures import MEASURES, RELATIVE, SHARE, Scale, has, short_kinds
from lorakit.cli._words import in_words, label, said
from lorakit.errors import SpecError
from lorakit.pictures.chart import Chart, Line, chart
from lorakit.pictures.heatmap import ALL, Cell, Heatmap, heatmap
from lorakit.pictures.html import Section, Table, page
from lorakit.pictures.svg import Picture, below, document, grid
from lorakit.pictures.svg import label as text_label
from lorakit.pictures.text import BOLD, SIZE, TITLE, cut, width, wrapped
from lorakit.tensorfile.copying import write_all
from lorakit.tensorfile.replacing import check_file, check_space, replaced_file

if TYPE_CHECKING:
    from lorakit.operations.inspection import Group, Inspection

PANEL = 420
LINE, LINES = 18, 12
NOTHING = Picture(width=0, height=0, body="")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scales:
    """A scale a measure, the same for all files."""

    by_measure: tuple[Scale, ...]
    several: bool

    @classmethod
    def of(cls, found: "Sequence[Inspection]") -> "Scales":
        """Take them over all files."""
        return cls(
            by_measure=tuple(Scale.of(measure, found) for measure in MEASURES),
            several=len(found) > 1,
        )

    def first(self) -> list[Scale]:
        """Return those that are shown at once: the share, and the size beside the model."""
        return [scale for scale in self.by_measure if scale.measure in (SHARE, RELATIVE)]


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
    scales = Scales.of(found)
    sections = [_section(one, found, scales) for one in found]
    return page(file_names(found), sections, _facts(found))


def as_svg(found: "Sequence[Inspection]") -> str:
    """Return one picture, the LoRAs side by side."""
    heads, curves = [_head(one) for one in found], [_curves(one, found) for one in found]
    scales = Scales.of(found)
    maps = [[_map(one, scale, scales) for one in found] for scale in scales.first()]
    if len(found) == 1:
        # One file is wider than high: the maps stand beside the rest.
        rows = [[below([heads[0], curves[0]]), *(row[0] for row in maps if row[0].body)]]
    else:
        rows = [heads, curves, *maps]
    kept = [row for row in rows if any(picture.body for picture in row)]
    return document(grid(kept), f"lorakit inspect: {file_names(found)}")


def _section(one: "Inspection", all_: "Sequence[Inspection]", scales: Scales) -> Section:
    """Put maps first, but beside other files the curves, which are of one height."""
    there = [scale for scale in scales.by_measure if has(one, scale.measure)]
    shown = [scale for scale in scales.first() if scale in there]
    first = [_heatmap(one, scale, scales) for scale in shown]
    rest = [_heatmap(one, scale, scales) for scale in there if scale not in shown]
    curves = [_curves(one, all_)] if one.spectrum and one.spectrum.ranks else []
    return Section(
        title=file_name(one.path),
        lead=" ".join(summary(one)),
        command=advice(one),
        warnings=one.faults or (),
        figures=(*curves, *first) if scales.several else (*first, *curves),
        folded=(*rest, *_needed(one), *_metadata(one.metadata)),
    )


def _facts(found: "Sequence[Inspection]") -> Table:
    """Return all that is known of the files, a column each."""
    told = [facts(one) for one in found]
    names = dict.fromkeys(name for one in told for name in one if name not in ("file", "faults"))
    return Table(
        title="About the file" if len(found) == 1 else "About the files",
        columns=("", *(file_name(one.path) for one in found)) if len(found) > 1 else (),
        rows=tuple((name, *(one.get(name, "") for one in told)) for name in names),
    )


def _map(one: "Inspection", scale: Scale, scales: Scales) -> Picture:
    return heatmap(_heatmap(one, scale, scales)) if has(one, scale.measure) else NOTHING


def _heatmap(one: "Inspection", scale: Scale, scales: Scales) -> Heatmap:
    """Return blocks and kinds, coloured by one scale; the tips tell the others too."""
    kinds, measure = short_kinds(one), scale.measure
    most = max((measure.value(block) or 0.0 for block in one.blocks), default=0.0)
    rows = {}
    for block in one.blocks:
        inside = {group.id: group for group in one.cells.get(block.id, ())}
        row = {
            short: Cell(
                text=scale.text(inside[kind]),
                heat=scale.heat(inside[kind]),
                tip=_tip(inside[kind], f"{block.id} {short}", scales),
            )
            for kind, short in kinds.items()
            if kind in inside
        }
        bar = (measure.value(block) or 0.0) / most if most else None
        row[ALL] = Cell(text=scale.text(block), bar=bar, tip=_tip(block, block.id, scales))
        rows[block.id] = row
    return Heatmap(
        title=measure.title[0].upper() + measure.title[1:],
        columns=(*kinds.values(), ALL),
        rows=rows,
        total={
            short: Cell(text=scale.text(kind), tip=_tip(kind, short, scales))
            for kind, short in zip(one.kinds, kinds.values(), strict=True)
        },
        ends=(scale.at(0.0), scale.at(1.0)),
        note=f"(half way: {scale.at(0.5)}{'; the same in all files' if scales.several else ''})",
    )


def _tip(group: "Group", name: str, scales: Scales) -> str:
    told = [f"{name}: {group.layers} layers" if group.layers != 1 else f"{name}: 1 layer"]
    for scale in scales.by_measure:
        if scale.measure.value(group) is not None:
            told.append(f"{scale.measure.title} {scale.text(group)}")
    if group.dead:
        told.append(f"{group.dead} dead")
    return ", ".join(told)


def _curves(one: "Inspection", all_: "Sequence[Inspection]") -> Picture:
    spectrum = one.spectrum
    if spectrum is None or not spectrum.ranks:
        return NOTHING
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
    return chart(
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


def _head(one: "Inspection") -> Picture:
    """Write a file's name, what it is, its faults and what made it, as wide as a panel."""
    title = cut(file_name(one.path), PANEL / BOLD, TITLE)
    body, y = [text_label(title, 0, 14, kind="title", told=one.path)], 20.0
    told = facts(one)
    lines = [("", " ".join(summary(one)))]
    lines += [("warn", f"Fault: {fault}") for fault in one.faults or ()]
    lines += [("muted", f"Made by {told['made by']}.")] if "made by" in told else []
    for kind, text in lines:
        for line in wrapped(text, PANEL, lines=LINES):
            y += LINE
            body.append(text_label(line, 0, y, kind=kind))
    return Picture(width=max(PANEL, width(title, TITLE)), height=y + SIZE / 2, body="".join(body))
