"""Bytes from file to file."""

import os
from collections.abc import Iterator
from typing import BinaryIO

from lorakit.errors import OutputError
from lorakit.tensorfile.extents import opened
from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.reading import file_size, read_exactly, reading

_KERNEL_CHUNK = 2**26
_BUFFER = 2**22


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of the bytes to an unbuffered file, which may take fewer at once."""
    view = memoryview(data)
    while view:
        view = view[file.write(view[:_KERNEL_CHUNK]) :]


def copy_extent(extent: Extent, target: BinaryIO) -> Iterator[int]:
    """Append an extent of a file to another file, and yield the bytes done after each chunk.

    Raises:
        FileFormatError: the extent cannot be read whole.
        OSError: the target cannot be written.
    """
    left, end = extent.length, target.tell() + extent.length
    with opened(extent) as source:
        for done in _in_kernel(extent, source, target):
            left -= done
            yield done
        # A copy that failed may have moved on by bytes of which it told nothing.
        target.seek(end - left)
        with reading(extent.path):
            source.seek(extent.offset + extent.length - left)
        buffer = memoryview(bytearray(min(left, _BUFFER)))
        while left:
            chunk = buffer[:left]
            with reading(extent.path):
                read_exactly(source, extent.path, chunk)
            write_all(target, chunk)
            left -= len(chunk)
            yield len(chunk)


def check_size(file: BinaryIO, expected: int) -> None:
    """Check that a file that was written has as many bytes as were written.

    Raises:
        OutputError: it has not.
    """
    found = file_size(file)
    if found != expected:
        raise OutputError(
            f"{file.name}: expected {expected} bytes after writing, found {found}; the disk is "
            "failing or someone else writes there, choose another folder."
        )


def _in_kernel(extent: Extent, source: BinaryIO, target: BinaryIO) -> Iterator[int]:
    """Copy without a way through this process, as far as the system can."""
    copy = getattr(os, "copy_file_range", None)
    if copy is None:
        return
    position, left = extent.offset, extent.length
    while left:
        try:
            done = copy(source.fileno(), target.fileno(), min(left, _KERNEL_CHUNK), position)
        except OSError:
            # Other file systems, kernels or limits: the plain copy goes on from here, and meets
            # again, and names, whatever is a true failure.
            return
        if not done:
            return
        position += done
        left -= done
        yield done
