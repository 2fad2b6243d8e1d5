"""Names that Windows takes for something else than a file."""

from pathlib import PurePath

_PORTS = [f"{port}{number}" for port in ("COM", "LPT") for number in "123456789¹²³"]
_DEVICES = frozenset(("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS))
_SIGNS = '<>:"|?*'


def no_file_on_windows(path: PurePath) -> str | None:
    """Say why Windows would write something else than a file of this name, None if it would not.

    A device takes what is written to it (`nul.safetensors` is one), a colon opens a second stream
    of another file, and a dot or a space at the end is lost.

    Source: Naming Files, Paths, and Namespaces, https://learn.microsoft.com/windows/win32/fileio.
    """
    for part in path.parts[1:] if path.anchor else path.parts:
        if part in (".", ".."):
            continue
        if part.partition(".")[0].rstrip(" ").upper() in _DEVICES:
            return f"'{part}' is the name of a device"
        odd = [sign for sign in part if sign in _SIGNS or sign < " "]
        if odd:
            return f"'{part}' holds {odd[0]!r}, which no file's name can"
        if part[-1] in ". ":
            return f"'{part}' ends with {part[-1]!r}, which is lost"
    return None
