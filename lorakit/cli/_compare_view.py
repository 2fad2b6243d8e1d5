"""Tables of a comparison."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import click
from rich.table import Table

from lorakit.cli._render import results

if TYPE_CHECKING:
    from lorakit.operations.comparison import Compared, Comparison

PAIRS = 3
"""Pairs that fit beside each other; of more the largest and the smallest cosine are shown."""


def show_comparison(found: "Comparison", *, quiet: bool = False) -> None:
    """Print a comparison: the names, a row a block, all together, and the advice."""
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    for name, count in found.only_in.items():
        click.echo(f"{name} has {count} layers that not all of them have", err=True)
    if not quiet:
        console = results()
        console.print(_norms(found))
        console.print(_table(found))
    click.echo(found.advice)


def _norms(found: "Comparison") -> Table:
    table = Table(box=None, pad_edge=False)
    titles = ("", "name", "norm", *(str(i + 1) for i in range(len(found.names))))
    for title in titles:
        table.add_column(title, justify="left" if title in ("", "name") else "right")
    for number, name in enumerate(found.names):
        cosines = [f"{value:.3f}" for value in found.total.cosines[number]]
        table.add_row(str(number + 1), name, f"{found.total.norms[number]:.4g}", *cosines)
    return table


def _table(found: "Comparison") -> Table:
    pairs = list(combinations(range(len(found.names)), 2))
    shared, kept = found.kind == "loras", found.total.energy is not None
    one = len(pairs) == 1
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    table.add_column("layers", justify="right")
    for title in _titles(found, pairs, shared=shared):
        table.add_column(title, justify="right")
    if kept:
        table.add_column("kept", justify="right")
    for row in (*found.blocks, found.total):
        cells = _alone(row, shared=shared) if one else _many(row, pairs, shared=shared)
        energy = [] if row.energy is None else [f"{row.energy:.1%}"]
        table.add_row(row.block, str(row.layers), *cells, *(energy if kept else []))
    return table


def _titles(
    found: "Comparison", pairs: Sequence[tuple[int, int]], *, shared: bool
) -> tuple[str, ...]:
    if len(pairs) == 1:
        plain = ("norm 1", "norm 2", "cosine", "distance", "conflict")
        return (*plain, "overlap", "by chance") if shared else plain
    if len(pairs) > PAIRS:
        return ("least cosine", "most cosine", "most conflict")
    names = [f"{i + 1}·{j + 1}" for i, j in pairs]
    cosines = tuple(f"cosine {name}" for name in names)
    return (*cosines, *(f"overlap {name}" for name in names)) if shared else cosines


def _alone(row: "Compared", *, shared: bool) -> list[str]:
    cells = [
        *(f"{norm:.4g}" for norm in row.norms),
        f"{row.cosines[0][1]:.3f}",
        f"{row.distances[0][1]:.4g}",
        f"{row.conflict[0][1]:.1%}",
    ]
    if shared:
        cells += [f"{row.overlap[0][1]:.1%}", f"{row.chance[0][1]:.1%}"]
    return cells


def _many(row: "Compared", pairs: Sequence[tuple[int, int]], *, shared: bool) -> list[str]:
    cosines = [row.cosines[i][j] for i, j in pairs]
    if len(pairs) > PAIRS:
        most = max(row.conflict[i][j] for i, j in pairs)
        return [f"{min(cosines):.3f}", f"{max(cosines):.3f}", f"{most:.1%}"]
    cells = [f"{cosine:.3f}" for cosine in cosines]
    return cells + [f"{row.overlap[i][j]:.1%}" for i, j in pairs] if shared else cells
