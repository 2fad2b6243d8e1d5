"""Text in pictures: how wide it may get, cut and wrapped so that it fits."""

import html
import unicodedata
from collections.abc import Mapping

SIZE = 12
TITLE = 14
BOLD = 1.15
"""How much wider a bold letter may be."""
_WIDTHS: Mapping[str, float] = {
    **dict.fromkeys("ijlI|!.,:;' ", 0.42),
    **dict.fromkeys('ftr()[]{}/\\-`"', 0.47),
    **dict.fromkeys("mwMW@%&…", 1.0),
    **dict.fromkeys("ABCDEFGHJKLNOPQRSTUVXYZ", 0.8),
    **dict.fromkeys("+<>=~#^_×→", 0.85),
}
_OTHER, _LETTER, _WIDE = 0.85, 0.65, 1.05


def width(text: str, size: float = SIZE) -> float:
    """Return the pixels that a text takes at most, in any usual font without serifs.

    Source: the advances of DejaVu Sans and Verdana, the widest of them.
    """
    return size * sum(_advance(character) for character in text)


def _advance(character: str) -> float:
    if character in _WIDTHS:
        return _WIDTHS[character]
    if character.isascii():
        return _LETTER
    return _WIDE if unicodedata.east_asian_width(character) in "WF" else _OTHER


def cut(text: str, room: float, size: float = SIZE) -> str:
    """Return a text that fits, its middle left out where it must be."""
    if width(text, size) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 2
        short = text[: kept - tail] + "…" + text[len(text) - tail :]
        if width(short, size) <= room:
            return short
    return "…"


def wrapped(text: str, room: float, *, lines: int, size: float = SIZE) -> list[str]:
    """Break a text at its spaces into lines that fit; the last one is cut where it is too long."""
    found: list[str] = []
    words = text.split()
    while words:
        count = len(words)
        while count > 1 and width(" ".join(words[:count]), size) > room:
            count -= 1
        if len(found) == lines - 1:
            count = len(words)
        found.append(cut(" ".join(words[:count]), room, size))
        words = words[count:]
    return found


def escaped(text: str) -> str:
    """Return a text as XML and HTML may hold it; characters that XML has none of become '?'."""
    return html.escape("".join(c if _is_sayable(c) else "?" for c in text))


def _is_sayable(character: str) -> bool:
    code = ord(character)
    return character in "\t\n" or (
        code >= 0x20 and not 0x7F <= code < 0xA0 and code & 0xFFFE < 0xFFFE
    )
