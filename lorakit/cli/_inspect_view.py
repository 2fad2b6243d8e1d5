"""What inspect found, as tables in a terminal."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.style import Style
from rich.table import Table
from rich.text import Text

from lorakit.cli._render import bytes_text, share_text
from lorakit.cli._words import FIRST, in_words, label, printable, said
from lorakit.pictures.colours import LIGHT, ink_on, step

if TYPE_CHECKING:
    from lorakit.operations.inspection import Curve, Group, Inspection, Spectrum

BAR = 24
SPECTRUM = "rank that keeps 90, 95, 99 % of the change, and what other ranks keep, %"
TEXT_ENCODERS = "text_encoder"
Number = Callable[["Group"], "float | None"]


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
        "blocks": " ".join(block.id for block in found.blocks),
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
    if found.against is None:
        return ""
    beside = [(b.norm, b.relative) for b in found.blocks if b.norm and b.relative]
    weights = math.hypot(*(norm / relative for norm, relative in beside))
    text = f"‖ΔW‖ / ‖W‖ {math.hypot(*(n for n, _ in beside)) / weights:.2%}" if beside else ""
    absent = f"{len(found.unmatched)} layers have no place in it" if found.unmatched else ""
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


MEASURES: Mapping[str, tuple[Number, Callable[[float], str]]] = {
    "share of the change, %": (lambda group: group.share, lambda share: f"{100 * share:.1f}"),
    "norm of the change": (lambda group: group.norm, lambda norm: f"{norm:.3g}"),
    "effective rank": (lambda group: group.effective_rank, lambda rank: f"{rank:.1f}"),
    "change relative to the model, %": (
        lambda group: group.relative,
        lambda relative: f"{100 * relative:.{2 if relative >= 0.001 else 4}f}",
    ),
}
"""What a map can show: its title -> the number, and how it is written."""
SHARE, NORM, RANK, RELATIVE = MEASURES


def short_kinds(found: "Inspection") -> dict[str, str]:
    """Return the kinds of layers with short names: TE1 and TE2 for text encoders, TE for one."""
    texts = [kind.id for kind in found.kinds if kind.id.startswith(TEXT_ENCODERS)]
    short = {name: f"TE{name.removeprefix(TEXT_ENCODERS).strip('_') or 1}" for name in texts}
    if len(texts) == 1:
        short = {texts[0]: "TE"}
    return {kind.id: short.get(kind.id, kind.id) for kind in found.kinds}


def cell_text(group: "Group", measure: str) -> str:
    """Write a number of some layers; '?' where none was measured, '-' where all are dead."""
    value, written = MEASURES[measure]
    number = value(group)
    if number is None:
        return "?"
    return written(number) if group.norm else "-"


def heat_of(group: "Group", measure: str, most: float) -> float | None:
    """Return how much of the largest number this is, None where there is none."""
    number = MEASURES[measure][0](group)
    return None if number is None or not group.norm or not most else number / most


def most_of(found: "Inspection", measure: str) -> float:
    """Return the largest number of a kind in a block."""
    value = MEASURES[measure][0]
    return max((value(g) or 0.0 for groups in found.cells.values() for g in groups), default=0.0)


def heat_table(found: "Inspection", measure: str) -> Table:
    """Return a map of blocks and kinds, coloured by how much; every number is written."""
    kinds = short_kinds(found)
    whole = [RANK, NORM] if measure == SHARE else []
    whole += [RELATIVE] if measure == SHARE and found.against is not None else []
    titles = {RANK: "rank", NORM: "norm", RELATIVE: "of W, %"}
    table = Table(box=None, pad_edge=False)
    table.add_column("block", no_wrap=True)
    for title in (*kinds.values(), "all", *(titles[name] for name in whole)):
        table.add_column(title, justify="right", no_wrap=True)
    most = most_of(found, measure)
    for block in found.blocks:
        inside = {group.id: group for group in found.cells.get(block.id, ())}
        row = [_cell(inside.get(kind), measure, most) for kind in kinds]
        row += [Text(cell_text(block, name)) for name in (measure, *whole)]
        table.add_row(Text(block.id), *row)
    sums = [Text(cell_text(kind, measure)) for kind in found.kinds]
    table.add_row(Text("all"), *sums)
    return table


def _cell(group: "Group | None", measure: str, most: float) -> Text:
    if group is None:
        return Text("")
    heat = heat_of(group, measure, most)
    return Text(cell_text(group, measure), style=Style.null() if heat is None else painted(heat))


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


def advice(found: "Inspection") -> str:
    """Say in one sentence which rank the LoRA needs."""
    spectrum = found.spectrum
    if spectrum is None:
        return ""
    total = spectrum.total
    need, most = total.needed["99"], total.rank
    if not need:
        return "It changes nothing, or nothing that has a rank."
    if need < most:
        return (
            f"Rank {need} of {most} keeps 99 % of the change: "
            f"lorakit resize {_quoted(found.path)} --rank {need} "
            f"-o {_quoted(f'{PurePath(found.path).stem}-rank{need}.safetensors')}"
        )
    less = total.needed["95"]
    rest = f"; rank {less} keeps 95 %" if less < most else ""
    return f"It needs its whole rank of {most} to keep 99 % of the change{rest}."


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path


def file_names(found: "Sequence[Inspection]") -> str:
    """Name the files, without their folders."""
    return ", ".join(one.path.replace("\\", "/").rstrip("/").rpartition("/")[2] for one in found)
