"""Time and memory of a command in a process of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.options import Options

SAMPLE_SECONDS = 0.01
STARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a command took: seconds, bytes of anonymous memory at the most, and what it said."""

    seconds: float
    peak: int
    status: int
    output: str
    errors: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What lorakit took on a device, and the JSON object that it printed."""

    seconds: float
    peak: int
    device: str
    report: dict[str, Any]


def python(*arguments: str | Path) -> Ran:
    """Run this Python with arguments and wait for its end."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Whatever this environment wants, an installed package comes with its bytecode.
    bytecode = {"PYTHONDONTWRITEBYTECODE": ""}
    where = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    environment = {**os.environ, **bytecode, **where}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        memory = _Memory(process.pid)
        output, errors = process.communicate()
    seconds = time.perf_counter() - start
    return Ran(
        seconds=seconds,
        peak=memory.peak(),
        status=process.returncode,
        output=output,
        errors=errors.strip(),
    )


def lorakit(*arguments: str | Path, given: Options) -> Measured:
    """Run `python -m lorakit ... --json` on the device and with the workers that are asked for."""
    print("$ lorakit", *(_short(argument) for argument in arguments), flush=True)
    workers = ["--threads", str(given.threads)] if given.threads else []
    ran = python("-m", "lorakit", *arguments, *workers, "--device", given.device, "--json")
    if ran.status:
        sys.exit(f"lorakit failed with {ran.status}: {ran.errors}")
    return Measured(
        seconds=ran.seconds, peak=ran.peak, device=given.device, report=json.loads(ran.output)
    )


@cache
def start(device: str = "cpu") -> float:
    """Return the seconds that every command that computes pays first: torch, and its device."""
    first = f"import torch; torch.zeros(1, device='{device}')"
    return quickest(["-c", first], rounds=STARTS).seconds


def quickest(arguments: Sequence[str | Path], *, rounds: int) -> Ran:
    """Return the fastest of several runs: what else runs on the machine only adds to it."""
    return min((python(*arguments) for _ in range(rounds)), key=lambda ran: ran.seconds)


class _Memory:
    """Watches the anonymous memory of a process; mapped files are the kernel's to give back."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak(self) -> int:
        self._thread.join()
        return self._peak or _largest_child()

    def _watch(self) -> None:
        # A process that has ended has no RssAnon line, or no file at all.
        while (now := self._now()) is not None:
            self._peak = max(self._peak, now)
            time.sleep(SAMPLE_SECONDS)

    def _now(self) -> int | None:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return None
        found = [line for line in lines if line.startswith("RssAnon:")]
        return int(found[0].split()[1]) * 1024 if found else None


def _largest_child() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _short(argument: str | Path) -> str:
    text = str(argument)
    return text.replace(str(ROOT) + os.sep, "")
