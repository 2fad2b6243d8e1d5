"""Opening files: what is wrong with one that is not what it should be."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import FileFormatError
from lorakit.tensorfile.uncached import read_uncached

MAX_HEADER = 100_000_000
ZIP_MAGIC = b"PK\x03\x04"

Stamp = tuple[int, int, int]
"""Of a file: its number, its size, and when it was written."""

_GIT_LFS = b"version https://git-lfs"
_PAGES = (b"<!doc", b"<html", b"<?xml", b"\n<!do")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one sentence why a file cannot be read.

    Raises:
        FileFormatError: instead of any OSError.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileFormatError(
            f"{path}: expected a file, found nothing there; check the path."
        ) from None
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected a readable file, found '{error.strerror or error}'; "
            "check the path and who may read it."
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered; a folder or a pipe is refused before it can block.

    Raises:
        FileFormatError: there is no such file, or it is not a regular one.
    """
    with reading(path):
        try:
            mode = path.stat().st_mode
        except ValueError:
            raise FileFormatError(
                f"{str(path)!r}: expected the name of a file, found one that no file can have; "
                "check where the name comes from."
            ) from None
        if stat.S_ISDIR(mode):
            raise FileFormatError(f"{path}: expected a file, found a folder; name a file in it.")
        if not stat.S_ISREG(mode):
            raise FileFormatError(
                f"{path}: expected a regular file, found a device or a pipe; name a file."
            )
        return open(path, "rb", buffering=0)


def file_size(file: BinaryIO) -> int:
    """Return the size of an open file."""
    return os.fstat(file.fileno()).st_size


def stamp_of(file: BinaryIO) -> Stamp:
    """Return what changes when someone writes to an open file or puts another in its place."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_exactly(file: BinaryIO, path: Path, buffer: memoryview) -> None:
    """Fill a buffer from where the file stands.

    Raises:
        FileFormatError: the file ends before.
    """
    filled = 0
    # macOS refuses to read 2 GiB or more at once.
    while filled < len(buffer):
        room = buffer[filled : filled + 2**28]
        got = read_uncached(file, room) or file.readinto(room)  # type: ignore[attr-defined]
        if not got:
            raise FileFormatError(
                f"{path}: expected {len(buffer) - filled} more bytes, found the end of the file; "
                "it was cut off or changed while it was read, get it again."
            )
        filled += got


def read_small(path: Path) -> bytes:
    """Read a file of text beside the tensors: an index, a configuration, presets.

    Raises:
        FileFormatError: it cannot be read, is no regular file, or is larger than any such file.
    """
    with open_regular(path) as file, reading(path):
        size = file_size(file)
        if size > MAX_HEADER:
            raise FileFormatError(
                f"{path}: expected a text of at most {MAX_HEADER} bytes, found {size}; it is "
                "something else, or damaged."
            )
        raw = bytearray(size)
        read_exactly(file, path, memoryview(raw))
    return bytes(raw)


def parse_json(text: str | bytes) -> Any:
    """Read JSON that comes from a file.

    Raises:
        ValueError: it is none, is nested too deeply, or is no UTF-8.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def is_pickle(start: bytes) -> bool:
    """Tell whether a file that is no safetensors begins as torch's checkpoints do."""
    legacy = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return start.startswith(ZIP_MAGIC) or legacy


def is_safetensors(start: bytes, size: int) -> bool:
    """Tell whether the first nine bytes of a file can begin a safetensors file."""
    length = int.from_bytes(start[:8], "little")
    return len(start) > 8 and length <= min(MAX_HEADER, size - 8) and start[8:9] in (b"{", b" ")


def what_it_is(start: bytes) -> tuple[str, str] | None:
    """Recognise a wrong kind of file by its first bytes.

    Returns:
        What it is and what to do, or None.
    """
    if start.startswith(b"GGUF"):
        return "a GGUF file", "dequantise it to safetensors first, lorakit reads no GGUF"
    if is_pickle(start):
        return "a pickled checkpoint", "open it as a model, or convert it to safetensors first"
    if start.startswith(_GIT_LFS):
        return "a Git LFS pointer", "download the file itself with `git lfs pull`"
    if start[:5].lower() in _PAGES:
        return "a web page", "the download failed, download the file again"
    return None
