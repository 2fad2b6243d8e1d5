"""SVG by plain functions: elements, and pictures that are put beside and below each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorakit.pictures.colours import style
from lorakit.pictures.text import escaped

GAP = 24
Attributes = Mapping[str, str | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A part of an SVG with its corner at (0, 0).

    Args:
        width: in pixels.
        height: likewise.
        body: its elements.
        label: what it shows, for those who cannot see it.
    """

    width: float
    height: float
    body: str
    label: str = ""


def element(name: str, attributes: Attributes, *inside: str) -> str:
    """Return an element; attributes without a value are left out."""
    told = "".join(f' {key}="{_value(value)}"' for key, value in attributes.items() if value != "")
    return f"<{name}{told}>{''.join(inside)}</{name}>" if inside else f"<{name}{told}/>"


def _value(value: str | float) -> str:
    return escaped(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def tip(text: str) -> str:
    """Return what a pointer on an element shows and a screen reader says; nothing for no text."""
    return element("title", {}, escaped(text)) if text else ""


def label(
    text: str, x: float, y: float, *, anchor: str = "", kind: str = "", told: str = ""
) -> str:
    """Return a line of text.

    Args:
        text: what it says.
        x: where it starts; its middle or end where `anchor` says so.
        y: its base line.
        anchor: "middle" or "end".
        kind: its class.
        told: its tip.
    """
    attributes: Attributes = {"x": x, "y": y, "text-anchor": anchor, "class": kind}
    return element("text", attributes, tip(told) + escaped(text))


def moved(picture: Picture, x: float, y: float) -> str:
    """Return a picture's elements at another place, as a group of its own."""
    where = {"transform": f"translate({_value(x)} {_value(y)})"}
    return element("g", where, tip(picture.label) + picture.body)


def below(pictures: Iterable[Picture], *, gap: float = GAP) -> Picture:
    """Put pictures below each other."""
    return grid([[picture] for picture in pictures], gap=gap)


def beside(pictures: Sequence[Picture], *, gap: float = 2 * GAP) -> Picture:
    """Put pictures beside each other."""
    return grid([pictures], aside=gap)


def grid(rows: Sequence[Sequence[Picture]], *, gap: float = GAP, aside: float = 2 * GAP) -> Picture:
    """Put pictures in rows and columns, each column as wide as its widest picture.

    Args:
        rows: of as many pictures each.
        gap: between the rows.
        aside: between the columns.
    """
    parts: list[str] = []
    widths = [max(picture.width for picture in column) for column in zip(*rows, strict=True)]
    y = 0.0
    for row in rows:
        x = 0.0
        for picture, wide in zip(row, widths, strict=True):
            parts += [moved(picture, x, y)] if picture.body else []
            x += wide + aside
        y += max((picture.height for picture in row), default=0.0) + gap
    whole = sum(widths) + aside * max(0, len(widths) - 1)
    return Picture(width=whole, height=max(0.0, y - gap), body="".join(parts))


def inline(picture: Picture) -> str:
    """Return a picture as an element of a page that has the style."""
    return element("svg", _frame(picture, picture.label), picture.body)


def document(picture: Picture, title: str, *, margin: float = GAP) -> str:
    """Return a picture as a file of its own, on paper that is light or dark as the reader's is."""
    framed = Picture(width=picture.width + 2 * margin, height=picture.height + 2 * margin, body="")
    paper = element("rect", {"width": "100%", "height": "100%", "class": "paper"})
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", **_frame(framed, title)},
        tip(title),
        element("style", {}, style()),
        paper,
        moved(picture, margin, margin),
    )


def _frame(picture: Picture, name: str) -> Attributes:
    return {
        "width": picture.width,
        "height": picture.height,
        "viewBox": f"0 0 {_value(picture.width)} {_value(picture.height)}",
        "role": "img",
        "aria-label": name,
    }
