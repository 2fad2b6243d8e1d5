"""Opening a file where a tensor's bytes lie in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.reading import Stamp, open_regular, read_exactly, reading, stamp_of

_BLOCK = 2**20


@contextmanager
def opened(extent: Extent) -> Iterator[BinaryIO]:
    """Open a file, unbuffered, where an extent begins.

    Raises:
        FileFormatError: the file cannot be read, or is not what it was when its header was read.
    """
    with open_regular(extent.path) as file:
        with reading(extent.path):
            if extent.stamp is not None:
                check_stamp(file, extent.path, extent.stamp)
            file.seek(extent.offset)
        # What fails while the file is open may be another file's fault.
        yield file


def chunks_of(extent: Extent) -> Iterator[memoryview]:
    """Yield the bytes of an extent, 1 MiB at a time, each good until the next is asked for.

    Raises:
        FileFormatError: the file cannot be read, or ends before.
    """
    buffer = memoryview(bytearray(min(extent.length, _BLOCK)))
    with open_regular(extent.path) as file:
        with reading(extent.path):
            file.seek(extent.offset)
        for start in range(0, extent.length, _BLOCK):
            block = buffer[: extent.length - start]
            with reading(extent.path):
                read_exactly(file, extent.path, block)
            yield block


def check_unchanged_file(path: Path, stamp: Stamp) -> None:
    """Check that a path leads to the file whose header was read.

    Raises:
        FileFormatError: it is another one, was written to, or cannot be read.
    """
    with open_regular(path) as file, reading(path):
        check_stamp(file, path, stamp)


def check_stamp(file: BinaryIO, path: Path, stamp: Stamp) -> None:
    """Check that an open file is the one whose header was read.

    Raises:
        FileFormatError: it is another one, or was written to.
    """
    found = stamp_of(file)
    if found != stamp:
        raise FileFormatError(
            f"{path}: expected the file as it was at first, of {stamp[1]} bytes, found one of "
            f"{found[1]} bytes; another program changed it meanwhile, start again."
        )
