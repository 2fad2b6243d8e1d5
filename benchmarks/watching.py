"""Where the time of an operation goes: in matrix work, and on a graphics card in kernels."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import torch

from lorakit.linalg import devices
from lorakit.linalg.factored import Decomposition
from lorakit.operations import spectra

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Span = tuple[float, float]
"""Start and end in seconds."""

SOLVERS = ("truncated_svds", "svd_for_rule", "decomposed_together")
"""What decomposes matrices that are on the device already."""


@dataclass(slots=True)
class Spans:
    """When workers were in the solver, and when matrices were made and sent to the device."""

    solving: list[Span] = field(default_factory=list)
    sending: list[Span] = field(default_factory=list)


@contextmanager
def watched(device: str) -> Iterator[Spans]:
    """Note when the solver works; a card is waited for at both ends, by the worker's own stream."""
    spans = Spans()
    with ExitStack() as patches:
        for name in SOLVERS:
            noted = _noted(getattr(spectra, name), spans.solving, device)
            patches.enter_context(patch.object(spectra, name, noted))
        first = _noted(Decomposition.first, spans.solving, device)
        patches.enter_context(patch.object(Decomposition, "first", first))
        sent = _noted(devices.stacked, spans.sending, device)
        patches.enter_context(patch.object(spectra, "stacked", sent))
        yield spans


def _noted(
    function: Callable[Arguments, Result], spans: list[Span], device: str
) -> Callable[Arguments, Result]:
    @wraps(function)
    def noted(*positional: Arguments.args, **named: Arguments.kwargs) -> Result:
        _finish_stream(device)
        start = time.perf_counter()
        found = function(*positional, **named)
        _finish_stream(device)
        # A list takes an item of any thread whole.
        spans.append((start, time.perf_counter()))
        return found

    return noted


def _finish_stream(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.current_stream(device).synchronize()


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans: the time in which at least one was on."""
    whole, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        whole += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Copies of one kind: their bytes, and the seconds that they took."""

    size: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a graphics card did: seconds with a kernel on it, seconds by kernel, copies by kind."""

    kernels: float
    by_name: Mapping[str, float]
    copies: Mapping[str, Copies]


@contextmanager
def profiled(trace: Path, device: str) -> Iterator[None]:
    """Write the trace of what runs within, the card's part of it where there is one."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA if device.startswith("cuda") else activity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        yield
    profiler.export_chrome_trace(str(trace))


def read_profile(trace: Path) -> Profile:
    """Read a trace that `profiled` wrote."""
    return profile_of(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def profile_of(events: Iterable[Mapping[str, Any]]) -> Profile:
    """Sum up the events of a trace, whose times are in microseconds."""
    spans: list[Span] = []
    by_name: dict[str, float] = {}
    copies: dict[str, Copies] = {}
    for event in events:
        kind, name = event.get("cat"), str(event.get("name"))
        if kind not in ("kernel", "gpu_memcpy"):
            continue
        start, seconds = 1e-6 * float(event["ts"]), 1e-6 * float(event["dur"])
        if kind == "kernel":
            spans.append((start, start + seconds))
            by_name[name] = by_name.get(name, 0.0) + seconds
            continue
        before = copies.get(name, Copies(size=0, seconds=0.0))
        copies[name] = Copies(
            size=before.size + int(event["args"].get("bytes", 0)),
            seconds=before.seconds + seconds,
        )
    return Profile(kernels=covered(spans), by_name=by_name, copies=copies)
