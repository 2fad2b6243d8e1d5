"""A table of numbers whose colours show how much they are."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.pictures.colours import step
from lorakit.pictures.svg import Picture, element, label
from lorakit.pictures.text import BOLD, TITLE, width

ROW = 20
_BASE = 14
_PADDING = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number as it is written; `heat` from 0 to 1, None for no colour; a tip for a pointer."""

    text: str
    heat: float | None = None
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """Rows of cells below column titles: row -> column -> cell; a cell may be missing."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Cell]]


def heatmap(table: Heatmap) -> Picture:
    """Draw a table; every number is written, so that no colour is needed to read it."""
    side = max((width(name) for name in table.rows), default=0.0) + 8
    column = max(
        (
            *(width(name) for name in table.columns),
            *(width(cell.text) for row in table.rows.values() for cell in row.values()),
        ),
        default=0.0,
    )
    column = max(column + _PADDING, 44.0)
    body = [label(table.title, 0, _BASE, kind="title")]
    for place, name in enumerate(table.columns):
        middle = side + (place + 0.5) * column
        body.append(label(name, middle, ROW + _BASE, anchor="middle", kind="muted"))
    for line, (name, row) in enumerate(table.rows.items(), start=2):
        body.append(label(name, 0, line * ROW + _BASE, kind="muted"))
        body += [
            _cell(row[title], side + place * column, line * ROW, column)
            for place, title in enumerate(table.columns)
            if title in row
        ]
    return Picture(
        width=max(side + len(table.columns) * column, width(table.title, TITLE) * BOLD),
        height=(len(table.rows) + 2) * ROW,
        body="".join(body),
        label=table.title,
    )


def _cell(cell: Cell, x: float, y: float, size: float) -> str:
    text = label(cell.text, x + size / 2, y + _BASE, anchor="middle", told=cell.tip)
    if cell.heat is None:
        return text
    box = element("rect", {"x": x + 1, "y": y + 1, "width": size - 2, "height": ROW - 2, "rx": 2})
    return element("g", {"class": f"h{step(cell.heat)}"}, box, text)
