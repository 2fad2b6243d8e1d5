"""Where a stream of bytes goes: past the page cache where the system allows it.

A checkpoint is written once and is larger than what is read back at once. Through the page cache
the kernel copies each of its bytes into a fresh page, a third of the time of a whole merge on a
virtual machine; written directly, the disk takes it from our own buffer.
"""

import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import BinaryIO, Protocol

from lorakit.tensorfile.copying import copy_extent, write_all
from lorakit.tensorfile.extents import opened
from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.reading import read_exactly, reading

LEAST = 2**26
"""Bytes below which a file is not worth it."""
BUFFER = 2**23
_BUFFERS = 3
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class Sink(Protocol):
    """What takes the bytes of a file, one after another."""

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""

    def copy(self, extent: Extent) -> Iterator[int]:
        """Append an extent of another file, and yield the bytes done after each chunk."""


@contextmanager
def sink_of(file: BinaryIO, total: int) -> Iterator[Sink]:
    """Give what writes to a new file; when the block ends well all bytes are on their way to disk.

    Args:
        file: unbuffered, empty, with a name.
        total: how many bytes will come.

    Raises:
        OSError: the file cannot be written, perhaps only when the block ends.
    """
    descriptor = _open_direct(file) if total >= LEAST else None
    if descriptor is None:
        yield Plain(file)
        return
    sink = Direct(file, descriptor)
    try:
        yield sink
        sink.finish()
    finally:
        sink.close()


def _open_direct(file: BinaryIO) -> int | None:
    """Open a file a second time, past the page cache; None where the system cannot."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None or not hasattr(os, "pwrite"):
        return None
    with suppress(OSError):
        return os.open(file.name, os.O_WRONLY | flag)
    return None


class Plain:
    """Through the page cache; stored bytes are copied by the kernel."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        write_all(self._file, data)

    def copy(self, extent: Extent) -> Iterator[int]:
        """Append an extent of another file, and yield the bytes done after each chunk."""
        return copy_extent(extent, self._file)


class Direct:
    """Past the page cache: whole buffers go to disk in a thread while the next one fills.

    Direct writes have to begin and end at multiples of a sector, from memory that does so too; the
    last bytes of the file, and whatever the system refuses, go through the page cache.
    """

    def __init__(self, file: BinaryIO, descriptor: int) -> None:
        self._file = file
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(1)
        self._maps = [mmap.mmap(-1, BUFFER) for _ in range(_BUFFERS)]
        self._free = deque(memoryview(found) for found in self._maps)
        self._waiting: deque[tuple[Future[None], memoryview]] = deque()
        self._buffer = self._free.popleft()
        self._filled = 0
        self._offset = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            room = self._room(len(view))
            room[:] = view[: len(room)]
            view = view[len(room) :]
            self._take(len(room))

    def copy(self, extent: Extent) -> Iterator[int]:
        """Append an extent of another file, and yield the bytes done after each chunk."""
        with opened(extent) as source:
            left = extent.length
            while left:
                room = self._room(left)
                with reading(extent.path):
                    read_exactly(source, extent.path, room)
                left -= len(room)
                self._take(len(room))
                yield len(room)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: something cannot be.
        """
        while self._waiting:
            self._reclaim()
        _write_at(self._file.fileno(), self._buffer[: self._filled], self._offset)

    def close(self) -> None:
        """Let go of the file, whatever happened."""
        self._pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _room(self, wanted: int) -> memoryview:
        return self._buffer[self._filled : self._filled + wanted]

    def _take(self, count: int) -> None:
        self._filled += count
        if self._filled < BUFFER:
            return
        future = self._pool.submit(self._flush, self._buffer, self._offset)
        self._waiting.append((future, self._buffer))
        self._offset += BUFFER
        self._filled = 0
        if not self._free:
            self._reclaim()
        self._buffer = self._free.popleft()

    def _reclaim(self) -> None:
        future, buffer = self._waiting.popleft()
        future.result()
        self._free.append(buffer)

    def _flush(self, buffer: memoryview, offset: int) -> None:
        done = 0
        try:
            done = os.pwrite(self._descriptor, buffer, offset)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        _write_at(self._file.fileno(), buffer[done:], offset + done)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
