"""What a process does to files, step by step, so that a test can break in at any of them.

Every call that changes a file system is a step: making, writing, copying, syncing, renaming,
removing. A step that writes has done half of its work when `act` is called for it; all others have
done nothing yet.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from lorakit.tensorfile import replacing

Act = Callable[[str], None]
"""Called with the name of each step; it may raise, kill, or do nothing."""

DATA = ("write", "pwrite", "copy_file_range")
"""Steps that write bytes."""
_WHOLE = ("chmod", "fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


@contextmanager
def watched(act: Act) -> Iterator[None]:
    """Let `act` be told of every step of the block."""
    with ExitStack() as stack:
        for name in _WHOLE:
            stack.enter_context(patch.object(os, name, _before(name, getattr(os, name), act)))
        for name in ("copy_file_range", "pwrite"):
            if hasattr(os, name):
                halved = _half_of(name, getattr(os, name), act)
                stack.enter_context(patch.object(os, name, halved))
        opener = _opener(builtins.open, act)
        stack.enter_context(patch.object(builtins, "open", opener))
        stack.enter_context(patch.object(io, "open", opener))
        stack.enter_context(patch.object(replacing, "swap", _before("swap", replacing.swap, act)))
        yield


def _before(name: str, function: Callable[..., Any], act: Act) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        act(name)
        return function(*args, **kwargs)

    return step


def _half_of(name: str, function: Callable[..., int], act: Act) -> Callable[..., int]:
    def copy(source: int, target: int, count: int, *place: int) -> int:
        done = function(source, target, max(1, count // 2), *place)
        act(name)
        return done

    def write(descriptor: int, data: memoryview, *place: int) -> int:
        done = function(descriptor, data[: max(1, len(data) // 2)], *place)
        act(name)
        return done

    return copy if name == "copy_file_range" else write


class _Halved(io.FileIO):
    """A file that takes half of what it is given."""

    act: Act

    def write(self, data: Any) -> int:
        view = memoryview(data)
        done = super().write(view[: max(1, len(view) // 2)])
        self.act("write")
        return done


def _opener(function: Callable[..., Any], act: Act) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return function(file, mode, *args, **kwargs)
        act("open")
        if kwargs.get("buffering") != 0:
            return function(file, mode, *args, **kwargs)
        made = _Halved(file, mode.replace("b", ""))
        made.act = act
        return made

    return opened


def stages(steps: list[str]) -> list[int]:
    """Choose steps to break in at: of each kind the first, the middle and the last."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(steps):
        places.setdefault("data" if name in DATA else name, []).append(place)
    return sorted({at[i] for at in places.values() for i in (0, len(at) // 2, -1)})
