"""Tables of a comparison."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from lorakit.cli._render import results
from lorakit.cli._words import printable

if TYPE_CHECKING:
    from lorakit.operations.comparison import Compared, Comparison

PAIRS = 3
"""Pairs that fit beside each other; of more the largest and the smallest cosine are shown."""
Pairs = Sequence[tuple[int, int]]


def show_comparison(found: "Comparison", *, quiet: bool = False, verbose: int = 0) -> None:
    """Print a comparison: the names, a row a layer if asked, a row a block, and the advice."""
    for note in found.notes:
        click.echo(f"note: {printable(note)}", err=True)
    for name, count in found.only_in.items():
        click.echo(f"{name} has {count} layers that not all of them have", err=True)
    if not quiet:
        console = results()
        console.print(_norms(found))
        if verbose:
            console.print(_table(found, found.rows, layers=True))
        console.print(_table(found, (*found.blocks, found.total)))
    click.echo(found.advice)


def _norms(found: "Comparison") -> Table:
    table = Table(box=None, pad_edge=False)
    titles = ("", "name", "norm", *(str(i + 1) for i in range(len(found.names))))
    for title in titles:
        table.add_column(title, justify="left" if title in ("", "name") else "right")
    for number, name in enumerate(found.names):
        cosines = [_cosine(value) for value in found.total.cosines[number]]
        norm = _number(found.total.norms[number])
        table.add_row(str(number + 1), Text(printable(name)), norm, *cosines)
    return table


def _table(found: "Comparison", rows: "Sequence[Compared]", *, layers: bool = False) -> Table:
    pairs = list(combinations(range(len(found.names)), 2))
    shared, kept = found.kind == "loras", found.total.energy is not None
    table = Table(box=None, pad_edge=False)
    if layers:
        table.add_column("layer", no_wrap=True)
    table.add_column("block")
    if not layers:
        table.add_column("layers", justify="right")
    for title in (*_titles(pairs, shared=shared), *(["kept of sum"] if kept else [])):
        table.add_column(title, justify="right")
    for row in rows:
        first = (Text(printable(row.module)), row.block) if layers else (row.block, str(row.layers))
        energy = "" if row.energy is None else f"{row.energy:.1%}"
        cells = _alone(row, shared=shared) if len(pairs) == 1 else _many(row, pairs, shared=shared)
        table.add_row(*first, *cells, *([energy] if kept else []))
    return table


def _titles(pairs: Pairs, *, shared: bool) -> tuple[str, ...]:
    if len(pairs) == 1:
        plain = ("norm 1", "norm 2", "cosine", "distance", "conflict", "weighted")
        return (*plain, "overlap", "by chance") if shared else plain
    if len(pairs) > PAIRS:
        return ("least cosine", "most cosine", "most conflict")
    names = [f"{i + 1}·{j + 1}" for i, j in pairs]
    cosines = tuple(f"cosine {name}" for name in names)
    overlaps = tuple(f"overlap {name}" for name in names) if shared else ()
    return (*cosines, *overlaps, "most conflict")


def _alone(row: "Compared", *, shared: bool) -> list[str]:
    cells = [
        *(_number(norm) for norm in row.norms),
        _cosine(row.cosines[0][1]),
        _number(row.distances[0][1]),
        f"{row.conflict[0][1]:.1%}",
        f"{row.weighted_conflict[0][1]:.1%}",
    ]
    if shared:
        cells += [f"{row.overlap[0][1]:.1%}", f"{row.chance[0][1]:.1%}"]
    return cells


def _many(row: "Compared", pairs: Pairs, *, shared: bool) -> list[str]:
    cosines = [row.cosines[i][j] for i, j in pairs]
    most = f"{max(row.conflict[i][j] for i, j in pairs):.1%}"
    if len(pairs) > PAIRS:
        return [_cosine(min(cosines)), _cosine(max(cosines)), most]
    cells = [_cosine(cosine) for cosine in cosines]
    return [*cells, *(f"{row.overlap[i][j]:.1%}" for i, j in pairs if shared), most]


def _cosine(value: float) -> str:
    # A zero has no sign to look at.
    return f"{round(value, 3) + 0.0:.3f}"


def _number(value: float) -> str:
    return f"{value:.4g}"
