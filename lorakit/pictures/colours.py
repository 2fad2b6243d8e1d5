"""The colours of pictures and tables, on light paper and on dark."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours as #rrggbb.

    Args:
        paper: behind all.
        card: behind what belongs together.
        ink: of text.
        muted: of what is beside the text.
        line: of grids.
        thin: of the lines that are not the main one.
        accent: of the main line.
        bar: of bars behind numbers.
        warn: of text that warns.
        alert: behind that.
        ramp: from little to much, in grey too; one hue, which no colour blindness takes away.
    """

    paper: str
    card: str
    ink: str
    muted: str
    line: str
    thin: str
    accent: str
    bar: str
    warn: str
    alert: str
    ramp: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    card="#f6f8fa",
    ink="#1b1f24",
    muted="#57606a",
    line="#d8dee4",
    thin="#848d97",
    accent="#0a55b3",
    bar="#cfdff2",
    warn="#7a3e00",
    alert="#fff3e0",
    ramp=(
        *("#f1f6fc", "#dfebf7", "#c8dcf0", "#abcbe6", "#86b5da"),
        *("#5f9bca", "#4180b8", "#2a66a0", "#174c84", "#083464"),
    ),
)
DARK = Theme(
    paper="#0d1117",
    card="#151b23",
    ink="#e6edf3",
    muted="#9aa4ae",
    line="#2b323b",
    thin="#7d8793",
    accent="#6cb6ff",
    bar="#23405f",
    warn="#ffb870",
    alert="#2b1d0c",
    ramp=(
        *("#13202f", "#172f49", "#1b4065", "#215382", "#2a689f"),
        *("#3a7fba", "#5598d0", "#7ab2e2", "#a6cdf0", "#d5e9fb"),
    ),
)
STEPS = len(LIGHT.ramp)


def step(share: float) -> int:
    """Return the place in the ramp of a share from 0 to 1."""
    return max(0, min(STEPS - 1, int(share * STEPS)))


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb.

    Source: WCAG 2.2.
    """
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21.

    Source: WCAG 2.2, which asks for 4.5 between text and what is behind it.
    """
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(colour: str) -> str:
    """Return black or white, whichever is easier to read on a colour; it is always enough."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def ink_of(theme: Theme, place: int) -> str:
    """Return the colour of text on a place of the ramp: next to nothing is said quietly."""
    return theme.muted if place == 0 else ink_on(theme.ramp[place])


def style() -> str:
    """Return the rules of the classes that pictures use, for light and for dark."""
    return _SHAPES + both(_rules)


def both(rules: Callable[[Theme], str]) -> str:
    """Return rules for light paper and for dark; what is printed is light."""
    dark = "".join(f"  {line}\n" for line in rules(DARK).splitlines())
    return f"{rules(LIGHT)}@media screen and (prefers-color-scheme: dark) {{\n{dark}}}\n"


_SHAPES = """\
svg text {
  font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
  font-size: 12px;
  font-variant-numeric: tabular-nums;
}
svg .title { font-size: 14px; font-weight: 600; }
svg .grid, svg .axis { stroke-width: 1; fill: none; }
svg .goal { stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
svg .thin { stroke-width: 1; stroke-opacity: 0.55; fill: none; }
svg .main { stroke-width: 2.5; fill: none; }
"""


def _rules(theme: Theme) -> str:
    rules = {
        "svg text": f"fill: {theme.ink}",
        "svg .paper": f"fill: {theme.paper}",
        "svg .muted": f"fill: {theme.muted}",
        "svg .warn": f"fill: {theme.warn}",
        "svg .grid": f"stroke: {theme.line}",
        "svg .axis": f"stroke: {theme.muted}",
        "svg .goal": f"stroke: {theme.muted}",
        "svg .thin": f"stroke: {theme.thin}",
        "svg .main": f"stroke: {theme.accent}",
        "svg .dot": f"fill: {theme.accent}",
        "svg .bar": f"fill: {theme.bar}",
    }
    for place, colour in enumerate(theme.ramp):
        rules[f"svg .h{place} rect"] = f"fill: {colour}"
        rules[f"svg .h{place} text"] = f"fill: {ink_of(theme, place)}"
    return "".join(f"{selector} {{ {rule}; }}\n" for selector, rule in rules.items())
