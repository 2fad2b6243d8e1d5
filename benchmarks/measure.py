"""Time and memory of a command, and the limits of the machine it ran on."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT

BLOCK = 8 * 2**20
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a command took, and the JSON object that it printed."""

    seconds: float
    peak: int
    report: dict[str, Any]


def lorakit(*arguments: str | Path, threads: int | None = None) -> Measured:
    """Run `python -m lorakit ... --json` in a process of its own."""
    workers = ["--threads", str(threads)] if threads else []
    command = [sys.executable, "-m", "lorakit", *map(str, arguments), *workers, "--json"]
    print("$ lorakit", *(_short(argument) for argument in arguments), flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        memory = _Memory(process.pid)
        output, errors = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"lorakit failed with {process.returncode}: {errors.strip()}")
    return Measured(seconds=seconds, peak=memory.peak(), report=json.loads(output))


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


def copy_and_sync(source: Path, folder: Path) -> float:
    """Return the seconds to copy a file in 8 MiB blocks and sync it: the least a rewrite takes."""
    target = folder / "copy.tmp"
    start = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK):
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def read_all(*files: Path) -> float:
    """Return the seconds to read files into one buffer: the least that looking at them takes."""
    buffer = bytearray(BLOCK)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def gemm_rate(*, width: int = 40, seconds: float = 1.0) -> float:
    """Return the fp32 FLOP/s of [1280, 5120] @ [5120, width] on all cores."""
    left, right = torch.randn(1280, 5120), torch.randn(5120, width)
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        left @ right
        rounds += 1
    return rounds * 2 * 1280 * 5120 * width / (time.perf_counter() - start)


def show(title: str, measured: Measured, *, limit: float, limit_name: str, size: int) -> None:
    """Print one line of results: time against the limit, throughput and memory.

    Args:
        title: what ran.
        measured: how it went.
        limit: the seconds that no program could go below.
        limit_name: what the limit is.
        size: the bytes of the files read.
    """
    print(
        f"  {title}: {measured.seconds:.2f} s, {size / measured.seconds / 1e9:.2f} GB/s, "
        f"peak {measured.peak / 2**20:.0f} MiB; {limit_name} {limit:.2f} s, "
        f"ratio {measured.seconds / limit:.2f}"
    )


def versions() -> str:
    """Return the versions and the machine that the numbers belong to."""
    import safetensors

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"safetensors {safetensors.__version__}, {os.cpu_count()} cores, {platform.platform()}"
    )


def _short(argument: str | Path) -> str:
    text = str(argument)
    return text.replace(str(ROOT) + os.sep, "")
