"""A page that needs nothing but itself: no script, no font, no other file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.pictures.colours import STEPS, Theme, both, ink_of, style
from lorakit.pictures.heatmap import Heatmap, heattable
from lorakit.pictures.svg import Picture, inline
from lorakit.pictures.text import escaped

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load: nothing. Text from files that were downloaded ends up in this page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text, perhaps below column titles; the first column says what a row is."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the page tells of one file.

    Args:
        title: the file's name.
        lead: a few sentences.
        command: what to type next, if anything.
        warnings: what is wrong, a sentence each.
        figures: maps and pictures, side by side where there is room.
        folded: what is shown when it is asked for, and printed always.
    """

    title: str
    lead: str = ""
    command: str = ""
    warnings: tuple[str, ...] = ()
    figures: tuple[Heatmap | Picture, ...] = ()
    folded: tuple[Heatmap | Table, ...] = ()


def page(title: str, sections: Sequence[Section], facts: Table) -> str:
    """Return a page: what is known of all files in one table, then a section a file.

    Args:
        title: of the page.
        sections: side by side where there is room.
        facts: a column a file.
    """
    rows = max((len(section.figures) for section in sections), default=0)
    shown = "".join(_section(section, rows) for section in sections)
    kind = "several" if len(sections) > 1 else "single"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
        f'<h1>{escaped(title)}</h1>\n<main class="{kind}">\n{shown}</main>\n'
        f"{_plain(facts)}</body>\n</html>\n"
    )


def _section(section: Section, rows: int) -> str:
    """Return a file's part; its pieces take as many rows as the file beside it has."""
    lead = f'<p class="lead">{_bound(section.lead)}</p>\n' if section.lead else ""
    command = f"<pre><code>{escaped(section.command)}</code></pre>\n" if section.command else ""
    warnings = "".join(f"<li>{_bound(text)}</li>\n" for text in section.warnings)
    warned = f'<ul class="warnings" aria-label="Faults">\n{warnings}</ul>\n' if warnings else ""
    figures = [*map(_figure, section.figures), *["<div></div>\n"] * rows][:rows]
    return (
        f'<section style="--rows: {rows + 2}">\n'
        f"<div><h2>{escaped(section.title)}</h2>\n{lead}{command}{warned}</div>\n"
        f'<div class="figures">\n{"".join(figures)}</div>\n'
        f"<div>{''.join(map(_folded, section.folded))}</div>\n</section>\n"
    )


def _bound(text: str) -> str:
    """Return a text whose numbers stay in the line of their per cent sign."""
    return re.sub(r"(?<=\d) %", "&nbsp;%", escaped(text))


def _figure(drawn: Heatmap | Picture) -> str:
    inside = heattable(drawn) if isinstance(drawn, Heatmap) else f"{inline(drawn)}\n"
    return f"<figure>{inside}</figure>\n"


def _folded(inside: Heatmap | Table) -> str:
    body = heattable(inside) if isinstance(inside, Heatmap) else _table(inside)
    return f"<details><summary>{escaped(inside.title)}</summary>\n{body}</details>\n"


def _plain(table: Table) -> str:
    return f"<section>\n<h2>{escaped(table.title)}</h2>\n{_table(table)}</section>\n"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in table.columns)
    head = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    rows = "".join(map(_row, table.rows))
    title = escaped(table.title)
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">\n<table>\n'
        f"{head}<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _row(row: tuple[str, ...]) -> str:
    name, *values = (escaped(text) for text in row)
    cells = "".join(f"<td>{value}</td>" for value in values)
    return f'<tr><th scope="row">{name}</th>{cells}</tr>\n'


def _style() -> str:
    return _SHAPES + both(_rules) + style()


_SHAPES = """\
:root { color-scheme: light dark; }
body {
  margin: 0 auto;
  padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem;
  max-width: 110rem;
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
main { margin-bottom: 2.5rem; }
section { min-width: 0; }
.single h2 { display: none; }
.single .figures { display: flex; flex-wrap: wrap; gap: 1.75rem 3rem; align-items: flex-start; }
.several { display: grid; gap: 2.5rem; }
.several { grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); }
@supports (grid-template-rows: subgrid) {
  .several > section { display: grid; grid-template-rows: subgrid; row-gap: 0.75rem; }
  .several > section { grid-row: span var(--rows); }
  .several .figures { display: contents; }
}
.lead { margin: 0 0 0.75rem; max-width: 46rem; }
pre { margin: 0 0 0.75rem; padding: 0.5rem 0.75rem; border-radius: 6px; }
pre { width: fit-content; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, Consolas, Menlo, monospace; }
.warnings { margin: 0 0 0.75rem; padding: 0.5rem 0.75rem 0.5rem 2rem; border-radius: 6px; }
.warnings { max-width: 44rem; overflow-wrap: anywhere; }
figure { margin: 0 0 1.25rem; min-width: 0; max-width: 100%; }
figure svg { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1.25rem 0.2rem 0; }
td { overflow-wrap: anywhere; min-width: 4rem; max-width: 34rem; }
th { font-weight: 500; white-space: nowrap; }
thead th { font-weight: 600; }
.heat { border-collapse: separate; border-spacing: 2px; font-size: 12.5px; line-height: 1.3; }
.heat { font-variant-numeric: tabular-nums; }
.heat caption { text-align: left; font-size: 14px; font-weight: 600; padding-bottom: 0.35rem; }
.heat th, .heat td { text-align: right; padding: 2px 7px; border-radius: 3px; min-width: 1.9rem; }
.heat th { font-weight: 400; }
.heat th[scope=row] { text-align: left; padding-left: 0; position: sticky; left: 0; }
.heat tfoot > tr > * { padding-top: 4px; }
.heat .bar, .bars thead th:last-child { padding-right: 5.5rem; }
.heat .bar { background-size: 4.8rem 55%; border-radius: 0; }
.heat .bar { background-position: right 50%; background-repeat: no-repeat; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 0 0.5rem; margin: 0.4rem 0 0; }
.legend { font-size: 12px; }
.legend span { display: inline-flex; }
.legend i { width: 14px; height: 12px; }
details { margin: 0.25rem 0; }
summary { cursor: pointer; padding: 0.25rem 0; width: fit-content; }
details .heat caption { display: none; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  .several { display: block; }
  section { margin-bottom: 1.5rem; }
  figure, tr { break-inside: avoid; }
  .heat td, .legend i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def _rules(theme: Theme) -> str:
    rules = {
        "body": f"background: {theme.paper}; color: {theme.ink}",
        "th, summary, .legend": f"color: {theme.muted}",
        "thead th, .heat caption": f"color: {theme.ink}",
        ".heat thead th": f"color: {theme.muted}",
        "tbody tr + tr > *": f"border-top: 1px solid {theme.line}",
        ".heat tr > *": "border: 0",
        ".heat th[scope=row]": f"background: {theme.paper}",
        "pre": f"background: {theme.card}; border: 1px solid {theme.line}",
        ".warnings": f"background: {theme.alert}; color: {theme.warn}",
        ".bar": "background-image: linear-gradient(to right, "
        f"{theme.bar} var(--p), {theme.bar}00 0)",
        ":focus-visible": f"outline: 2px solid {theme.accent}",
    }
    for place in range(STEPS):
        rules[f".h{place}"] = f"background: {theme.ramp[place]}; color: {ink_of(theme, place)}"
    return "".join(f"{selector} {{ {rule}; }}\n" for selector, rule in rules.items())
