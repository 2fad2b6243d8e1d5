"""Opening a file where a tensor's bytes lie in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.reading import file_size, open_regular, reading


@contextmanager
def opened(extent: Extent) -> Iterator[BinaryIO]:
    """Open a file, unbuffered, where an extent begins.

    Raises:
        FileFormatError: the file cannot be read, or is not what it was when its header was read.
    """
    with open_regular(extent.path) as file:
        with reading(extent.path):
            size = file_size(file)
            file.seek(extent.offset)
        if extent.size is not None and size != extent.size:
            raise FileFormatError(
                f"{extent.path}: expected {extent.size} bytes, found {size}; "
                "another program changed it meanwhile, start again."
            )
        # What fails while the file is open may be another file's fault.
        yield file
