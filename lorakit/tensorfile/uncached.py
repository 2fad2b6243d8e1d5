"""Reading past the page cache what would not stay in it: files of over half of the memory.

For each page of such a file the kernel would find a fresh one and throw another away, which costs
more than to read it, and takes from the memory what other programs will need again.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import BinaryIO

_SHARE = 2
_CHUNK = 2**20
_SECTOR = 4096
_POSSIBLE = all(hasattr(os, name) for name in ("O_DIRECT", "preadv", "sysconf"))

_own = threading.local()


def read_uncached(file: BinaryIO, buffer: memoryview) -> int:
    """Read from where a large file stands, and leave it behind what was read.

    Args:
        file: unbuffered.
        buffer: is filled from its beginning.

    Returns:
        The bytes read; 0 where the file is small, at its end, or the system cannot do it.
    """
    if not is_uncached(file):
        return 0
    position = file.tell()
    with suppress(OSError):
        done = _direct(file, buffer, position)
        file.seek(position + done)
        return done
    return 0


def is_uncached(file: BinaryIO) -> bool:
    """Tell whether an open file is so large that it is read past the page cache."""
    return _POSSIBLE and os.fstat(file.fileno()).st_size * _SHARE >= _memory()


def _direct(file: BinaryIO, buffer: memoryview, position: int) -> int:
    """Read at most a chunk from the disk: whole sectors, into memory that begins at one."""
    before = position % _SECTOR
    wanted = min(len(buffer), _CHUNK)
    room = _room()[: -(-(before + wanted) // _SECTOR) * _SECTOR]
    with _opened_direct(file) as descriptor:
        done = min(os.preadv(descriptor, [room], position - before) - before, wanted)
    if done <= 0:
        return 0
    buffer[:done] = room[before : before + done]
    return done


@contextmanager
def _opened_direct(file: BinaryIO) -> Iterator[int]:
    """Open a file a second time, past the page cache.

    Raises:
        OSError: the system cannot, or another file has that name now.
    """
    descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
    try:
        if not os.path.sameopenfile(descriptor, file.fileno()):
            raise FileNotFoundError(file.name)
        yield descriptor
    finally:
        os.close(descriptor)


def _room() -> memoryview:
    """Return this thread's own chunk, with the sectors that it may begin and end in."""
    if not hasattr(_own, "room"):
        _own.room = memoryview(mmap.mmap(-1, _CHUNK + 2 * _SECTOR))
    room: memoryview = _own.room
    return room


@lru_cache(maxsize=1)
def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
