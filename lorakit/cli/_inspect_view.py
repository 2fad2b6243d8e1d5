"""What inspect found, as tables in a terminal."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.style import Style
from rich.table import Table
from rich.text import Text

from lorakit.cli._inspect_words import percent, relative
from lorakit.cli._letters import printable
from lorakit.cli._measures import NORM, RANK, RELATIVE, SHARE, Measure, Scale, short_kinds
from lorakit.cli._render import bytes_text, share_text
from lorakit.cli._words import FIRST, in_words, label, said
from lorakit.names.blocks import format_ids
from lorakit.pictures.colours import LIGHT, ink_on, step

if TYPE_CHECKING:
    from lorakit.operations.inspection import Curve, Group, Inspection, Spectrum

BAR = 24
SPECTRUM = "rank that keeps 90, 95, 99 % of the change, and what other ranks keep, %"


def facts(found: "Inspection") -> dict[str, str]:
    """Return what a file is, in plain words by name."""
    told = {
        "file": found.path,
        "kind": counts(found.adapters) if found.adapters else found.kind,
        "architecture": found.architecture or "not known",
        "names": found.layout,
        "layers": f"{found.layers} ({counts(found.components)})",
        "ranks": counts(found.ranks),
        "alphas": counts(found.alphas),
        "dtypes": counts(found.dtypes),
        "size": f"{bytes_text(found.nbytes)} in {found.tensors} tensors",
        "blocks": format_ids([block.id for block in found.blocks]).replace(",", " "),
        "not known": f"{len(found.unclaimed)} tensors" if found.unclaimed else "",
        "norm": "" if found.norm is None else f"{found.norm:.4g}",
        "of the model": _beside(found),
        "not measured": _unmeasured(found),
        "dead layers": str(len(found.dead)) if found.dead else "",
        "faults": "none found" if found.faults == () else "\n".join(found.faults or ()),
    }
    recipe = found.metadata.get("lorakit.recipe")
    told["made by"] = in_words("lorakit.recipe", recipe) if recipe else ""
    for key, name in FIRST.items():
        if said(found.metadata.get(key)):
            told[name] = in_words(key, found.metadata[key])
    return {name: value for name, value in told.items() if value}


def counts(found: Mapping[str, int]) -> str:
    """Write how often each value is there; a single one alone."""
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{value}: {count}" for value, count in found.items())


def _beside(found: "Inspection") -> str:
    """Say how large ‖ΔW‖ is beside ‖W‖ over all blocks, and what has no place in the model."""
    share = relative(found)
    text = "" if share is None else f"‖ΔW‖ / ‖W‖ {percent(share)}"
    count = len(found.unmatched)
    layers = "1 layer has" if count == 1 else f"{count} layers have"
    absent = f"{layers} no place in it" if count else ""
    return ", ".join(part for part in (text, absent) if part)


def _unmeasured(found: "Inspection") -> str:
    """Say why some layers have no norm."""
    count = len(found.unmeasured)
    return f"{count} layers, whose change depends on the model" if count else ""


def pairs(values: Mapping[str, str]) -> Table:
    """Return a table of names and values; nothing in them is read as markup."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        lines = "\n".join(map(printable, value.split("\n")))
        table.add_row(Text(printable(name)), Text(lines))
    return table


def metadata_table(metadata: Mapping[str, str]) -> Table:
    """Return all that the metadata says, in plain words."""
    return pairs(
        {label(key): in_words(key, text) for key, text in sorted(metadata.items()) if said(text)}
    )


def blocks_table(blocks: "tuple[Group, ...]") -> Table:
    """Return the table of blocks, a bar for each share."""
    table = Table(box=None, pad_edge=False)
    for title in ("block", "layers", "norm", "share", "effective rank", "dead"):
        table.add_column(title, justify="left" if title == "block" else "right")
    table.add_column("")
    largest = max((block.share or 0.0 for block in blocks), default=0.0)
    for block in blocks:
        bar = round(BAR * (block.share or 0.0) / largest) if largest else 0
        table.add_row(
            block.id,
            str(block.layers),
            "" if block.norm is None else f"{block.norm:.4g}",
            share_text(block.share),
            "" if block.effective_rank is None else f"{block.effective_rank:.1f}",
            str(block.dead) if block.dead else "",
            "#" * bar,
        )
    return table


def heat_table(found: "Inspection", measure: Measure) -> Table:
    """Return a map of blocks and kinds, coloured by how much; every number is written."""
    kinds, scale = short_kinds(found), Scale.of(measure, [found])
    more = [RANK, NORM] if measure is SHARE else []
    more += [RELATIVE] if measure is SHARE and found.against is not None else []
    beside = [Scale.of(other, [found]) for other in more]
    table = Table(box=None, pad_edge=False)
    table.add_column("block", no_wrap=True)
    for title in (*kinds.values(), "all", *(other.short for other in more)):
        table.add_column(title, justify="right", no_wrap=True)
    for block in found.blocks:
        inside = {group.id: group for group in found.cells.get(block.id, ())}
        row = [_cell(inside.get(kind), scale) for kind in kinds]
        row += [Text(one.text(block)) for one in (scale, *beside)]
        table.add_row(Text(block.id), *row)
    sums = [Text(scale.text(kind)) for kind in found.kinds]
    table.add_row(Text("all"), *sums)
    return table


def _cell(group: "Group | None", scale: Scale) -> Text:
    if group is None:
        return Text("")
    heat = scale.heat(group)
    return Text(scale.text(group), style=Style.null() if heat is None else painted(heat))


def painted(share: float) -> Style:
    """Return the style of a cell: the pictures' colours, light paper or dark."""
    colour = LIGHT.ramp[step(share)]
    return Style(color=ink_on(colour), bgcolor=colour)


def spectrum_table(found: "Spectrum") -> Table:
    """Return the ranks that keep 90, 95 and 99 %, and what the powers of two keep, in per cent."""
    table = Table(box=None, pad_edge=False)
    shown = powers(found)
    goals = list(found.total.needed)
    table.add_column("block", no_wrap=True)
    for title in (*(f"{goal} %" for goal in goals), *(f"at {rank}" for rank in shown.values())):
        table.add_column(title, justify="right", no_wrap=True)
    for curve in (*found.blocks, found.total):
        kept = [Text(text, style=painted(share)) for text, share in _kept(curve, shown)]
        table.add_row(curve.id, *(str(curve.needed[goal]) for goal in goals), *kept)
    return table


def powers(found: "Spectrum") -> dict[int, int]:
    """Return the powers of two and the largest rank, by their place in the curves."""
    ranks = found.ranks
    return {
        place: rank
        for place, rank in enumerate(ranks)
        if rank & (rank - 1) == 0 or place == len(ranks) - 1
    }


def _kept(curve: "Curve", shown: Mapping[int, int]) -> Iterator[tuple[str, float]]:
    for place in shown:
        # What is less than all is not called 100.
        percent = 100 * curve.kept[place]
        yield f"{percent if percent > 99.999 else min(percent, 99.9):.1f}", curve.kept[place]
