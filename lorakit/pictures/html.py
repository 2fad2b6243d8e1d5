"""A page that needs nothing but itself: no script, no font, no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.pictures.colours import DARK, LIGHT, Theme, style
from lorakit.pictures.svg import Picture, inline
from lorakit.pictures.text import escaped

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load: nothing. Text from files that were downloaded ends up in this page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text below column titles, folded away until it is asked for."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the page tells of one file.

    Args:
        title: the file's name.
        facts: name -> value.
        remarks: sentences.
        pictures: in order.
        tables: below them.
    """

    title: str
    facts: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a page with the sections side by side where there is room."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n<main>\n{''.join(map(_section, sections))}</main>\n"
        "</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    facts = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>\n'
        for name, value in section.facts.items()
    )
    remarks = "".join(f"<p>{escaped(remark)}</p>\n" for remark in section.remarks)
    pictures = "".join(f"<figure>{inline(picture)}</figure>\n" for picture in section.pictures)
    return (
        f"<section>\n<h2>{escaped(section.title)}</h2>\n<table>\n{facts}</table>\n"
        f"{remarks}{pictures}{''.join(map(_table, section.tables))}</section>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escaped(text)}</td>" for text in row) + "</tr>\n"
        for row in table.rows
    )
    return (
        f"<details><summary>{escaped(table.title)}</summary>\n<table>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></details>\n"
    )


def _style() -> str:
    dark = "".join(f"  {line}\n" for line in _rules(DARK).splitlines())
    light = _rules(LIGHT)
    return f"{_SHAPES}{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n{style()}"


_SHAPES = """\
:root { color-scheme: light dark; }
body { margin: 1.5rem; font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { display: flex; flex-wrap: wrap; gap: 2.5rem; align-items: flex-start; }
section { flex: 1 1 30rem; min-width: 0; max-width: 60rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.15rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.15rem 1rem 0.15rem 0; }
td { overflow-wrap: anywhere; }
th[scope=row] { font-weight: 500; white-space: nowrap; }
figure { margin: 1.5rem 0; overflow-x: auto; }
summary { cursor: pointer; padding: 0.25rem 0; }
details table { font-variant-numeric: tabular-nums; }
"""


def _rules(theme: Theme) -> str:
    return (
        f"body {{ background: {theme.paper}; color: {theme.ink}; }}\n"
        f"th, summary {{ color: {theme.muted}; }}\n"
        f"thead th {{ border-bottom: 1px solid {theme.line}; }}\n"
    )
