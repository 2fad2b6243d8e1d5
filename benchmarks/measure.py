"""The limits of the machine, and how a command compares with them."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import process
from benchmarks.options import Options

BLOCK = 8 * 2**20
FEWEST_ROUNDS = 2


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


def as_asked(given: Options, *files: Path) -> None:
    """With `--cold` drop what the kernel has of files in memory, so that they are read from disk.

    Raises:
        SystemExit: this system has no way to do that.
    """
    if not given.cold:
        return
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("--cold expected a system with posix_fadvise, as Linux is; leave it out.")
    for path in files:
        with path.open("rb") as file:
            # Pages that were written and are not on disk yet cannot be dropped.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gemm_rate(
    *,
    width: int = 40,
    seconds: float = 1.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return the FLOP/s of [1280, 5120] @ [5120, width] on a device."""
    left = torch.randn(1280, 5120, device=device, dtype=dtype)
    right = torch.randn(5120, width, device=device, dtype=dtype)
    one = fastest(lambda: left @ right, seconds=seconds, device=device)
    return 2 * left.numel() * width / one


def fastest(function: Callable[[], object], *, seconds: float, device: str = "cpu") -> float:
    """Return the seconds of the fastest call, among all that fit a time, and two at the least."""
    finish(device)
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < FEWEST_ROUNDS or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        finish(device)
        found.append(time.perf_counter() - start)
    return min(found)


def finish(device: str) -> None:
    """Wait until a graphics card has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def show(
    title: str, measured: process.Measured, *, limit: float, limit_name: str, size: int
) -> None:
    """Print one line of results: time against the limit, throughput and memory.

    Args:
        title: what ran.
        measured: how it went.
        limit: the seconds that no program could go below.
        limit_name: what the limit is.
        size: the bytes of the files read.
    """
    start = process.start(measured.device)
    print(
        f"  {title} on {measured.device}: {measured.seconds:.2f} s, "
        f"{size / measured.seconds / 1e9:.2f} GB/s, peak {measured.peak / 2**20:.0f} MiB; "
        f"{limit_name} {limit:.2f} s, ratio {measured.seconds / limit:.2f}, "
        f"{(measured.seconds - start) / limit:.2f} without the start of {start:.2f} s",
        flush=True,
    )


def versions() -> str:
    """Return the versions and the machine that the numbers belong to."""
    import safetensors

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"safetensors {safetensors.__version__}, {os.cpu_count()} cores ({_processor()}), "
        f"{platform.platform()}"
    )


def device_name(device: str) -> str:
    """Return what a device is called, with the memory of a graphics card."""
    if not device.startswith("cuda"):
        return f"{device} ({_processor()})"
    card = torch.cuda.get_device_properties(device)
    return (
        f"{device} ({card.name}, {card.total_memory / 2**30:.0f} GiB, "
        f"CUDA {torch.version.cuda}, compute capability {card.major}.{card.minor})"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
