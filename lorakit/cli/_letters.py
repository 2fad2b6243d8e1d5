"""Letters that a console cannot take: what an old code page lacks, and what would steer it."""

import codecs

ERRORS = "lorakit.plain"
_PLAIN = {
    "‖": "|",
    "Δ": "d",
    "σ": "s",
    "Σ": "sum ",
    "−": "-",
    "·": "*",
    "…": "...",
    "²": "^2",
    "₁": "1",
    "₂": "2",
    "√": "sqrt ",
    "∞": "inf",
    "ᵀ": "^T",
    "ᵢ": "i",
}
"""What lorakit itself says; other letters, of names and metadata, become '?'."""
_JOINERS = "\u200c\u200d"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in letters), error.end


def never_fail_on_a_letter(stream: object) -> None:
    """Let a console or file in a legacy code page show other letters for those that it lacks.

    Source: Windows, whose consoles, pipes and redirected files are in cp1252 or cp932 by default.
    """
    codecs.register_error(ERRORS, _plainly)
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=ERRORS)


def printable(text: str) -> str:
    """Return a text that cannot steer a terminal: names and metadata come from files.

    What joins letters in some scripts, and in emoji, stays.
    """
    return "".join(
        c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "?" for c in text
    )
