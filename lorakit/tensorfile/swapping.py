"""Two folders that change places at once."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

_HERE = -100
"""What the kernel calls the current folder (AT_FDCWD)."""
_EXCHANGE, _SWAP = 2, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def swap(first: Path, second: Path) -> bool:
    """Let two names change places, so that at no moment one of them is missing.

    Returns:
        Whether they did; False where the system or the file system has no such call.

    Raises:
        OSError: it has, and it failed.

    Source: renameat2(2) of Linux, renamex_np(2) of macOS; Windows has none for folders.
    """
    call = _call()
    if call is None:
        return False
    if call(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    linux = getattr(library, "renameat2", None)
    if linux is not None:
        return lambda a, b: int(linux(_HERE, a, _HERE, b, _EXCHANGE))
    macos = getattr(library, "renamex_np", None)
    return None if macos is None else lambda a, b: int(macos(a, b, _SWAP))
