"""A table of numbers whose colours show how much they are, as a picture or in a page."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.pictures.colours import STEPS, step
from lorakit.pictures.svg import Attributes, Picture, element, label
from lorakit.pictures.text import BOLD, TITLE, escaped, width

ROW = 20
_BASE = 14
_PADDING = 14
_EDGE = 7
_SWATCH = 16
_BAR = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number as it is written.

    Args:
        text: the number.
        heat: from 0 to 1 for a colour, None for none.
        bar: from 0 to 1 for a bar, None for none.
        tip: what a pointer shows.
    """

    text: str
    heat: float | None = None
    bar: float | None = None
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """Rows of cells below column titles: row -> column -> cell; a cell may be missing.

    Args:
        title: above it.
        columns: in order.
        rows: in order.
        total: the last row, of sums; none where it is empty.
        ends: what the colours begin and end with; none where they are empty.
        note: what else of the colours is to be said.
    """

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Cell]]
    total: Mapping[str, Cell]
    ends: tuple[str, str]
    note: str = ""


ALL = "all"
"""What the row and the column of sums are called."""


def heatmap(table: Heatmap) -> Picture:
    """Draw a table; every number is written, so that no colour is needed to read it."""
    rows = {**table.rows, ALL: table.total} if table.total else table.rows
    side = max((width(name) for name in rows), default=0.0) + 8
    column = max(
        (
            *(width(name) for name in table.columns),
            *(width(cell.text) for row in rows.values() for cell in row.values()),
        ),
        default=0.0,
    )
    column = max(column + _PADDING, 44.0)
    body = [label(table.title, 0, _BASE, kind="title")]
    for place, name in enumerate(table.columns, start=1):
        at = side + place * column - _EDGE
        body.append(label(name, at, ROW + _BASE, anchor="end", kind="muted"))
    for line, (name, row) in enumerate(rows.items(), start=2):
        body.append(label(name, 0, line * ROW + _BASE, kind="muted"))
        body += [
            _cell(row[title], side + place * column, line * ROW, column)
            for place, title in enumerate(table.columns)
            if title in row
        ]
    foot = (len(rows) + 2) * ROW
    legend = _legend(table, foot + 6)
    wide = side + len(table.columns) * column + (_BAR if _has_bars(table) else 0)
    return Picture(
        width=max(wide, width(table.title, TITLE) * BOLD, legend.width),
        height=foot + legend.height,
        body="".join((*body, legend.body)),
        label=table.title,
    )


def _has_bars(table: Heatmap) -> bool:
    return any(cell.bar is not None for row in table.rows.values() for cell in row.values())


def _cell(cell: Cell, x: float, y: float, size: float) -> str:
    text = label(cell.text, x + size - _EDGE, y + _BASE, anchor="end", told=cell.tip)
    place: Attributes = {"x": x + 1, "y": y + 1, "width": size - 2, "height": ROW - 2, "rx": 2}
    if cell.bar is not None:
        long = max(0.0, min(1.0, cell.bar)) * _BAR
        box: Attributes = {"x": x + size, "y": y + 5, "width": long, "height": ROW - 10}
        return text + element("rect", {**box, "class": "bar"})
    if cell.heat is None:
        return text
    return element("g", {"class": f"h{step(cell.heat)}"}, element("rect", place), text)


def _legend(table: Heatmap, y: float) -> Picture:
    """Draw what the colours stand for, below a table."""
    if not any(table.ends):
        return Picture(width=0, height=0, body="")
    low, high = table.ends
    first = width(low) + 6
    body = [label(low, 0, y + _BASE, kind="muted")]
    for place in range(STEPS):
        box: Attributes = {"x": first + place * _SWATCH, "y": y + 3, "width": _SWATCH, "height": 14}
        body.append(element("g", {"class": f"h{place}"}, element("rect", box)))
    end = first + STEPS * _SWATCH + 6
    told = f"{high}   {table.note}".strip()
    body.append(label(told, end, y + _BASE, kind="muted"))
    return Picture(width=end + width(told), height=ROW, body="".join(body))


def heattable(table: Heatmap) -> str:
    """Return the same as an element of a page: a table that can be read aloud and copied."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in table.columns)
    rows = "".join(_row(name, row, table.columns) for name, row in table.rows.items())
    foot = f"<tfoot>\n{_row(ALL, table.total, table.columns)}</tfoot>\n" if table.total else ""
    title = escaped(table.title)
    bars = " bars" if _has_bars(table) else ""
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">\n'
        f'<table class="heat{bars}">\n<caption>{title}</caption>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n{foot}</table>\n"
        f"{_swatches(table)}</div>\n"
    )


def _row(name: str, row: Mapping[str, Cell], columns: tuple[str, ...]) -> str:
    cells = "".join(_data(row.get(title)) for title in columns)
    return f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>\n'


def _data(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    kind = "" if cell.heat is None else f' class="h{step(cell.heat)}"'
    if cell.bar is not None:
        kind = f' class="bar" style="--p:{100 * max(0.0, min(1.0, cell.bar)):.1f}%"'
    tip = f' title="{escaped(cell.tip)}"' if cell.tip else ""
    return f"<td{kind}{tip}>{escaped(cell.text)}</td>"


def _swatches(table: Heatmap) -> str:
    if not any(table.ends):
        return ""
    low, high, note = (f"<span>{escaped(text)}</span>" for text in (*table.ends, table.note))
    boxes = "".join(f'<i class="h{place}"></i>' for place in range(STEPS))
    return f'<p class="legend">{low}<span aria-hidden="true">{boxes}</span>{high}{note}</p>\n'
