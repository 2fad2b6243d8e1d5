"""What a process does to the rest of the machine, seen by Python's audit hook.

A hook cannot be taken away again, so there is one, which listens only inside `watching`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NEVER = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "urllib.Request", "webbrowser.open"),
    *("ftplib.connect", "smtplib.connect", "shutil.copyfile", "shutil.move", "pty.spawn"),
    *("cpython.run_command", "cpython.run_file", "code.__new__"),
)
_WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
_MODIFIES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LIBRARIES = tuple(
    os.path.realpath(place)
    for place in {sys.prefix, sys.base_prefix, *sys.path, str(Path(__file__).parents[2])}
    if place
)
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")

_allowed: list[str] = []
_found: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event in _NEVER:
        _found.append(f"{event} {args!r:.200}")
    elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        _check(os.fsdecode(args[0]), event, writes=bool((args[2] or 0) & _MODIFIES))
    elif event in _WRITING and isinstance(args[0], str | bytes | os.PathLike):
        _check(os.fsdecode(args[0]), event, writes=True)


def _check(name: str, event: str, *, writes: bool) -> None:
    place = os.path.realpath(name) if "\0" not in name else name
    inside = any(_below(place, folder) for folder in _allowed)
    ours = place.startswith(_SYSTEM) or any(_below(place, folder) for folder in _LIBRARIES)
    reads = ours and not writes
    if not inside and not reads and "__pycache__" not in place:
        _found.append(f"{event} {place}")


def _below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


sys.addaudithook(_hook)


@contextmanager
def watching(*folders: Path) -> Iterator[None]:
    """Fail where the block runs a program, opens a connection, or a file outside the folders."""
    _found.clear()
    _allowed.extend(os.path.realpath(folder) for folder in folders)
    try:
        yield
    finally:
        _allowed.clear()
    assert not _found, _found
