"""A bar on stderr, none where nobody watches."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from lorakit.progress import Progress, silent

BYTES = "bytes"
_REFRESH = 0.1


@contextmanager
def watching(*, quiet: bool) -> Iterator[Progress]:
    """Show how far the work is, with the time left; silent when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _listener(bar)


def _listener(bar: Bar) -> Progress:
    tasks: dict[str, tuple[TaskID, float]] = {}
    shown: dict[str, float] = {}

    def listen(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in tasks:
            tasks[what] = (bar.add_task(what, total=_scaled(what, total), rate=""), now)
        if done < total and now - shown.get(what, 0.0) < _REFRESH:
            return
        shown[what] = now
        task, began = tasks[what]
        seconds = max(now - began, 1e-9)
        rate = f"{done / seconds / 2**20:.0f} MiB/s" if what == BYTES else ""
        bar.update(task, completed=_scaled(what, done), total=_scaled(what, total), rate=rate)

    return listen


def _scaled(what: str, count: int) -> int:
    return count // 2**20 if what == BYTES else count
