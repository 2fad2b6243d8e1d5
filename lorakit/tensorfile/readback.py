"""What is around the tensors of an output, read back and compared with what was written."""

from collections.abc import Mapping
from pathlib import Path

from lorakit.errors import OutputError
from lorakit.tensorfile.differing import same_files
from lorakit.tensorfile.reading import reading


def check_header(file: Path, expected: bytes) -> None:
    """Check that a written file begins with the header that was written, byte for byte.

    Raises:
        OutputError: it begins otherwise.
    """
    with reading(file), open(file, "rb", buffering=0) as opened:
        found = opened.read(len(expected))
    _refuse_unless(found == expected, file, "header")


def check_beside(folder: Path, texts: Mapping[str, str], copies: Mapping[str, Path]) -> None:
    """Check that the texts and the copies of a written folder are what they should be.

    Raises:
        OutputError: one is not.
        FileFormatError: one cannot be read.
    """
    for name, text in texts.items():
        with reading(folder / name):
            found = (folder / name).read_bytes()
        _refuse_unless(found == text.encode(), folder / name, "text")
    for name, origin in copies.items():
        _refuse_unless(same_files(folder / name, origin), folder / name, "copy")


def _refuse_unless(same: bool, file: Path, what: str) -> None:
    if not same:
        raise OutputError(
            f"{file}: expected the {what} that was written, found another; someone else changed "
            "it or the disk is failing, write it again."
        )
