"""What a user sees at the end of a command."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from lorakit.cli._letters import printable

if TYPE_CHECKING:
    from lorakit.report import Report, Row, Scoring

SHOWN = 10
WIDE = 240
_NATURAL = 10_000
_GROUPS = {
    "norms": (".norm", "layer_norm", "ln_", ".in_layers.0", ".out_layers.0", "out.0."),
    "embeddings": ("embedding",),
    "biases": ("bias",),
    "convolutions": (".in_layers.2.", ".out_layers.3.", ".op.", ".skip_connection.", "conv"),
    "text encoders": ("conditioner.", "cond_stage_model.", "text_"),
}
"""Kinds of tensors by what their names hold, looked at in this order."""


def show_report(report: "Report", *, quiet: bool, verbose: int) -> None:
    """Print a report: a short table of what was done and lost."""
    for note in report.notes:
        say(f"note: {note}", err=True)
    if report.unmatched:
        _list(f"left out, no place in the output: {len(report.unmatched)}", report.unmatched)
    if report.lost:
        shares = [f"{name} ({share:.1%})" for name, share in _lost(report.lost).items()]
        _list(f"changed, but not in this LoRA: {len(report.lost)} tensors", shares)
    if quiet:
        return
    if verbose and report.rows:
        show_table(_rows_table(report.rows, scores=report.scoring is not None))
    show_table(_summary_table(report), folded=True)


def results() -> Console:
    """Return the console for results: as wide as it takes where no terminal cuts it."""
    width = None if sys.stdout.isatty() else WIDE
    # Names from files and of files are text, also where they look like markup: [b], :car:
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def show_table(table: Table, *, folded: bool = False) -> None:
    """Print a table without spaces at the ends of lines, and never cut a number or a name.

    Where it is wider than the terminal its columns move together; what is still too wide goes on
    in the next line.

    Args:
        table: what to print.
        folded: its last column is text, which the terminal's width may break.
    """
    console = results()
    natural = console.options.update(width=_NATURAL)
    if folded:
        natural = console.options
    elif console.measure(table, options=natural).maximum > console.width:
        table.padding = (0, 1, 0, 0)
    for line in console.render_lines(table, natural, pad=False):
        console.print(Segments([*_stripped(line), Segment.line()]), end="", soft_wrap=True)


def _stripped(line: list[Segment]) -> list[Segment]:
    """Return a line without the plain spaces at its end."""
    kept = list(line)
    while kept and not kept[-1].text.strip() and not (kept[-1].style and kept[-1].style.bgcolor):
        kept.pop()
    if kept and not (kept[-1].style and kept[-1].style.bgcolor):
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept


def say(text: str, *, err: bool = False) -> None:
    """Print a sentence, broken between words where a terminal would break it anywhere.

    Nothing in it steers a terminal: names and metadata come from files.
    """
    text = printable(text)
    if (sys.stderr if err else sys.stdout).isatty():
        text = textwrap.fill(
            text, shutil.get_terminal_size().columns, break_on_hyphens=False, break_long_words=False
        )
    click.echo(text, err=err)


def cells(*texts: str) -> list[Text]:
    """Return cells of a table; nothing in them is markup or steers a terminal."""
    return [Text(printable(text)) for text in texts]


def _list(what: str, names: Iterable[str]) -> None:
    listed = list(names)
    click.echo(what, err=True)
    for name in listed[:SHOWN]:
        click.echo(f"  {printable(name)}", err=True)
    if len(listed) > SHOWN:
        click.echo(f"  and {len(listed) - SHOWN} more", err=True)


def _lost(lost: Mapping[str, float]) -> dict[str, float]:
    """Sum the shares by kind of tensor, the largest first."""
    sums: dict[str, float] = {}
    for key, share in lost.items():
        group = next((g for g, marks in _GROUPS.items() if any(m in key for m in marks)), key)
        sums[group] = sums.get(group, 0.0) + share
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _rows_table(rows: "Iterable[Row]", *, scores: bool) -> Table:
    """Return a row a layer; its name comes last, so that a long one moves no number."""
    table = Table(box=None, pad_edge=False)
    scored = ("last score", "cut from") if scores else ()
    for title in ("block", "rank", "norm", "kept", "error", *scored, "layer"):
        table.add_column(title, justify="left" if title in ("block", "layer") else "right")
    for row in rows:
        given = (_number(row.score_kept), _number(row.score_cut)) if scores else ()
        numbers = (_number(row.norm), share_text(row.energy), _number(row.error))
        ranks = _ranks(row.rank_before, row.rank_after)
        name = f"{row.module}: {row.note}" if row.note else row.module
        table.add_row(*cells(row.block, ranks, *numbers, *given, name))
    return table


def _summary_table(report: "Report") -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(report):
        table.add_row(*cells(name, value))
    return table


def _facts(report: "Report") -> list[tuple[str, str]]:
    totals: dict[str, Any] = report.as_dict()["totals"]
    facts = [("command", report.command), ("layers", str(totals["layers"]))]
    if report.dropped:
        facts.append(("left empty", f"{len(report.dropped)} layers, not written"))
    if totals["rank_before"] or totals["rank_after"]:
        facts.append(("largest rank", _ranks(totals["rank_before"], totals["rank_after"])))
    for name, key in (("norm of the change", "norm"), ("relative error", "error")):
        if totals[key] is not None:
            facts.append((name, _number(totals[key])))
    if totals["energy"] is not None:
        facts.append(("energy kept", share_text(totals["energy"])))
    if report.scoring is not None:
        facts.append(("score", _scoring(report.scoring)))
    if report.plan is not None:
        facts += _plan(report)
    if report.verified is not None:
        facts.append(("verified", _verified(report)))
    if report.output is not None:
        size = "" if report.output_bytes is None else f" ({bytes_text(report.output_bytes)})"
        facts.append(("written", f"{report.output}{size}"))
    return facts


def _plan(report: "Report") -> list[tuple[str, str]]:
    plan = report.plan
    if plan is None:
        return []
    return [
        ("would write at most", bytes_text(plan.output_bytes)),
        ("peak memory at most", bytes_text(plan.peak_bytes)),
        ("would run on", f"{plan.device}, {plan.threads} workers"),
        ("dry run", "nothing was written"),
    ]


def _scoring(found: "Scoring") -> str:
    name = found.score if found.against is None else f"{found.score} of {found.against}"
    ends = (("last kept", found.lowest_kept), ("first cut", found.highest_cut))
    return ", ".join([name, *(f"{what} {_number(end)}" for what, end in ends if end is not None)])


def _verified(report: "Report") -> str:
    found = report.verified
    if found is None:
        return ""
    untouched = f", {found.untouched} untouched tensors the same" if found.untouched else ""
    return (
        f"{found.layers} layers, relative error at most {found.largest:.2e}, "
        f"mean {found.mean:.2e}{untouched}"
    )


def _ranks(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        known = before if after is None else after
        return "" if known is None else str(known)
    return f"{before} -> {after}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def share_text(value: float | None) -> str:
    """Write a share as per cent, nothing for None."""
    return "" if value is None else f"{value:.2%}"


def bytes_text(count: int) -> str:
    """Write a size for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
