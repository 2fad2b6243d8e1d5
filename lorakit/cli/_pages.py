"""Memory that is freed stays with the process: fresh pages cost as much as the work on them."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_KEPT = 2**30


def keep_pages() -> None:
    """Tell glibc to keep freed blocks for the next tensor; nothing happens on other systems.

    By default every tensor's pages go back to the kernel, which zeroes them before they are used
    again: a third of the system time of a merge into a checkpoint. One arena, because a thread's
    own cannot hold a large block; and nothing mapped by itself, because that goes back at once.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in (
        (_ARENA_MAX, 1),
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, _KEPT),
    ):
        mallopt(parameter, value)
