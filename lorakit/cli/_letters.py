"""Letters that a console in an old code page lacks: written in ASCII, never a crash."""

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
