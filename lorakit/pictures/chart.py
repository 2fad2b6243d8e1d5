"""Lines over a logarithmic axis: what is kept against rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.pictures.svg import Attributes, Picture, element, label, tip
from lorakit.pictures.text import BOLD, TITLE, width

_LEFT, _TOP, _FOOT, _NOTE = 48.0, 30.0, 44.0, 20.0
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve by its points (x from 1, y from 0 to 1); one of the lines may be the main one."""

    name: str
    points: tuple[tuple[float, float], ...]
    main: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines, and points to mark on them with a tip each.

    Args:
        title: above it.
        axis: what x is.
        lines: the main one is drawn last.
        marks: (x, y, tip).
        note: a line below all of it.
        most: where x ends.
    """

    title: str
    axis: str
    lines: tuple[Line, ...]
    marks: tuple[tuple[float, float, str], ...] = ()
    note: str = ""
    most: float


def chart(drawn: Chart, *, wide: float = 420.0, high: float = 220.0) -> Picture:
    """Draw lines, x on a logarithmic scale from 1, y in per cent.

    Args:
        drawn: what to draw.
        wide: of the whole picture; more where the title needs it.
        high: of the plane alone.
    """
    wide = max(wide, width(drawn.title, TITLE) * BOLD, width(drawn.note))
    plane = _Plane(wide=wide - _LEFT - 12, high=high, most=max(drawn.most, 2.0))
    body = [label(drawn.title, 0, 14, kind="title")]
    for share in _TICKS:
        y = plane.y(share)
        body.append(_path([(_LEFT, y), (wide - 12, y)], "grid"))
        body.append(label(f"{share:.0%}", _LEFT - 6, y + 4, anchor="end", kind="muted"))
    for tick in ticks(plane.most, plane.wide):
        x = plane.x(tick)
        body.append(_path([(x, plane.y(0)), (x, plane.y(0) + 4)], "axis"))
        text = f"{tick:g}"
        body.append(label(text, x, plane.y(0) + 18, anchor="middle", kind="muted"))
    middle = _LEFT + plane.wide / 2
    body.append(label(drawn.axis, middle, plane.y(0) + 36, anchor="middle", kind="muted"))
    for line in sorted(drawn.lines, key=lambda line: line.main):
        points = [(plane.x(x), plane.y(y)) for x, y in line.points]
        body.append(_path(points, "main" if line.main else "thin", line.name))
    for x, y, said in drawn.marks:
        place: Attributes = {"cx": plane.x(x), "cy": plane.y(y), "r": 4, "class": "dot"}
        body.append(element("circle", place, tip(said)))
    high += _TOP + _FOOT
    if drawn.note:
        body.append(label(drawn.note, 0, high + _NOTE / 2, kind="muted"))
        high += _NOTE
    told = ". ".join(part for part in (drawn.title, drawn.note) if part)
    return Picture(width=wide, height=high, body="".join(body), label=told)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    wide: float
    high: float
    most: float

    def x(self, value: float) -> float:
        """Return the pixel of a rank."""
        return _LEFT + self.wide * math.log2(max(value, 1.0)) / math.log2(self.most)

    def y(self, share: float) -> float:
        """Return the pixel of a share."""
        return _TOP + self.high * (1 - share)


def ticks(most: float, room: float) -> list[float]:
    """Return powers of two from 1, and the end of the axis, whose numbers do not touch."""
    top = math.log2(most)
    found = [most]
    for power in range(int(top), -1, -1):
        apart = room * (math.log2(found[-1]) - power) / top
        if apart >= (width(f"{found[-1]:g}") + width(f"{2**power:g}")) / 2 + 6:
            found.append(float(2**power))
    return found[::-1]


def _path(points: Sequence[tuple[float, float]], kind: str, told: str = "") -> str:
    where = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", {"d": where, "class": kind}, tip(told))
