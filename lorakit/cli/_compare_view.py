"""Tables of a comparison."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from lorakit.cli._letters import printable
from lorakit.cli._render import say, show_table

if TYPE_CHECKING:
    from lorakit.operations.comparison import Compared, Comparison

PAIRS = 3
"""Pairs that fit beside each other; of more the largest and the smallest cosine are shown."""
Pairs = Sequence[tuple[int, int]]


def show_comparison(found: "Comparison", *, quiet: bool = False, verbose: int = 0) -> None:
    """Print a comparison: the names, a row a layer if asked, a row a block, and the advice."""
    for note in found.notes:
        say(f"note: {note}", err=True)
    for name, count in found.only_in.items():
        layers = "1 layer" if count == 1 else f"{count} layers"
        say(f"{name} has {layers} that not all of them have", err=True)
    if not quiet:
        show_table(_norms(found))
        if verbose:
            click.echo()
            show_table(_table(found, found.rows, layers=True))
        click.echo()
        show_table(_table(found, (*found.blocks, found.total)))
        if found.mixture is not None and (verbose or not found.mixture.even):
            click.echo()
            show_table(_shares(found))
        click.echo()
    say(found.advice)


def _norms(found: "Comparison") -> Table:
    table = Table(box=None, pad_edge=False)
    angles = found.kind != "models"
    titles = ("", "name", "norm", *(str(i + 1) for i in range(len(found.names)) if angles))
    for title in titles:
        table.add_column(title, justify="left" if title in ("", "name") else "right")
    for number, name in enumerate(found.names):
        cosines = [_cosine(value) for value in found.total.cosines[number] if angles]
        norm = _number(found.total.norms[number])
        table.add_row(str(number + 1), Text(printable(name)), norm, *cosines)
    return table


def _table(found: "Comparison", rows: "Sequence[Compared]", *, layers: bool = False) -> Table:
    pairs = list(combinations(range(len(found.names)), 2))
    kept = found.total.energy is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    titles = [*_titles(found, pairs), *(["kept of sum"] if kept else [])]
    for title in titles if layers else ["layers", *titles]:
        table.add_column(title, justify="right")
    if layers:
        table.add_column("layer")
    for row in rows:
        energy = [f"{row.energy or 0.0:.1%}"] if kept else []
        cells = [*_cells(found, row, pairs), *energy]
        if layers:
            table.add_row(row.block, *cells, Text(printable(row.module)))
        else:
            table.add_row(row.block, str(row.layers), *cells)
    return table


def _titles(found: "Comparison", pairs: Pairs) -> tuple[str, ...]:
    if found.kind == "models":
        return ("norm 1", "norm 2", "distance, %", "share of it, %")
    shared = found.kind == "loras"
    if len(pairs) == 1:
        plain = ("norm 1", "norm 2", "cosine", "distance", "conflict", "weighted")
        return (*plain, "overlap", "chance") if shared else plain
    if len(pairs) > PAIRS:
        return ("least cosine", "most cosine", "most conflict")
    names = [f"{i + 1}·{j + 1}" for i, j in pairs]
    cosines = tuple(f"cosine\n{name}" for name in names)
    overlaps = tuple(f"overlap\n{name}" for name in names) if shared else ()
    return (*cosines, *overlaps, "most\nconflict")


def _cells(found: "Comparison", row: "Compared", pairs: Pairs) -> list[str]:
    if found.kind == "models":
        whole = found.total.apart[0][1]
        share = row.apart[0][1] / whole if whole else 0.0
        distance = f"{100 * row.distances[0][1]:.3f}"
        return [*(_number(norm) for norm in row.norms), distance, f"{100 * share:.1f}"]
    shared = found.kind == "loras"
    return _alone(row, shared=shared) if len(pairs) == 1 else _many(row, pairs, shared=shared)


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


def _shares(found: "Comparison") -> Table:
    """Return what each block of a mixture is made of, and what that leaves."""
    table = Table(box=None, pad_edge=False)
    mixture = found.mixture
    if mixture is None:
        return table
    names = list(next(iter(mixture.blocks.values())).shares)
    table.add_column(f"{printable(mixture.name)} in")
    for name in (*names, "left"):
        table.add_column(Text(printable(name)), justify="right")
    for block, part in mixture.blocks.items():
        shares = [f"{round(part.shares[name], 2) + 0.0:.2f}" for name in names]
        table.add_row(block, *shares, f"{part.residual:.2%}")
    return table


def _cosine(value: float) -> str:
    # A zero has no sign to look at.
    return f"{round(value, 3) + 0.0:.3f}"


def _number(value: float) -> str:
    return f"{value:.4g}"
