"""Temporary files beside an output: what a killed run left is removed, what is in use stays."""

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_CUT = 16
_HEX = 8
_YOUNG = 60.0
"""Seconds in which a new file may not have its lock yet."""


def sibling(path: Path) -> Path:
    """Return a new hidden name beside a path."""
    # Cut short, because names and paths of the greatest length must still work.
    return path.with_name(f".{path.name[:_CUT]}.{secrets.token_hex(_HEX // 2)}.tmp")


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use for as long as this process lives.

    The kernel takes the mark away from a process that is killed. Windows needs none: it removes no
    file that is open. Where a file system has no locks, nothing there is ever taken for left over.
    """
    descriptor = _locked(temporary)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs that wrote to this path left beside it; what fails is let be."""
    ours = re.compile(re.escape(f".{path.name[:_CUT]}.") + rf"[0-9a-f]{{{_HEX}}}\.tmp")
    with suppress(OSError):
        for entry in path.parent.iterdir():
            if ours.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_unless_held(entry)


def _remove_unless_held(entry: Path) -> None:
    if time.time() - entry.stat().st_mtime < _YOUNG:
        return
    if sys.platform == "win32":
        # A folder's files may all be closed for a moment while it is in use.
        if entry.is_file():
            entry.unlink()
        return
    descriptor = _locked(entry)
    if descriptor is None:
        return
    try:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    finally:
        os.close(descriptor)


def _locked(entry: Path) -> int | None:
    """Return a descriptor that holds the lock, None where it cannot be had."""
    if sys.platform == "win32":
        return None
    with suppress(OSError):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    return None
