"""A source's tensors, streamed into a file that is open."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import BinaryIO

from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import FileFormatError
from lorakit.progress import Progress
from lorakit.tensorfile.casting import stored
from lorakit.tensorfile.copying import check_size, write_all
from lorakit.tensorfile.dtypes import bytes_of
from lorakit.tensorfile.hashes import Hashes
from lorakit.tensorfile.header import Extent, Spec, format_header, layout
from lorakit.tensorfile.plain import DictSource, TensorSource
from lorakit.tensorfile.sinks import Sink, sink_of

WHAT = "bytes written"

Step = Extent | str


def laid_out(source: TensorSource) -> dict[str, Spec]:
    """Return the specs in the order in which the tensors are stored."""
    return {key: source.specs[key] for key in layout(source.specs)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What was written: the header, and the bytes in all."""

    header: bytes
    nbytes: int


def size_of(source: TensorSource) -> int:
    """Return the size of the file that a source becomes."""
    specs = laid_out(source)
    header, _ = _begun(source, specs)
    return len(header) + sum(spec.nbytes for spec in specs.values())


def stream(
    file: BinaryIO, source: TensorSource, *, compute: Compute, progress: Progress, before: int = 0
) -> Streamed:
    """Write header and tensors; stored bytes are copied, the others computed ahead by workers.

    What is to tell its own hashes is hashed while it is written, and gets its header at the end.

    Args:
        file: unbuffered, empty.
        source: where the tensors come from.
        compute: workers, and the bytes in flight.
        progress: told the bytes written, `before` added.
        before: the bytes that were written to other files of the same output.

    Raises:
        OutputError: the file has not the size that it should have.
    """
    specs = laid_out(source)
    header, hashes = _begun(source, specs)
    total = len(header) + sum(spec.nbytes for spec in specs.values())
    steps = plan(source, specs)
    computed = [step for step in steps if isinstance(step, str)]
    with sink_of(file, total) as sink, closing(_values(source, specs, computed, compute)) as values:
        # The workers begin before the first long copy.
        ahead = chain([next(values)], values) if computed else values
        sink.write(header)
        done = len(header)
        progress(WHAT, before + done, before + total)
        for amount in _write(sink, steps, ahead, hashes):
            done += amount
            progress(WHAT, before + done, before + total)
    if hashes is not None:
        header = hashes.header()
        file.seek(0)
        write_all(file, header)
    check_size(file, total)
    return Streamed(header=header, nbytes=total)


def _begun(source: TensorSource, specs: Mapping[str, Spec]) -> tuple[bytes, Hashes | None]:
    """Return the header to begin with, and what takes the hashes that are missing in it."""
    if isinstance(source, DictSource) and source.hashed:
        hashes = Hashes(specs, source.metadata)
        return hashes.blank, hashes
    return format_header(specs, source.metadata), None


def plan(source: TensorSource, specs: Mapping[str, Spec]) -> list[Step]:
    """Return what to copy and what to compute, in order; neighbouring bytes become one copy.

    Raises:
        FileFormatError: the stored bytes are not as many as the spec says.
    """
    steps: list[Step] = []
    for key, spec in specs.items():
        extent = source.extent(key)
        if extent is None:
            steps.append(key)
            continue
        if extent.length != spec.nbytes:
            raise FileFormatError(
                f"{source.name}: {key} expected {spec.nbytes} bytes, found {extent.length}; "
                "get the file again."
            )
        last = steps[-1] if steps else None
        if isinstance(last, Extent) and _is_next(last, extent):
            steps[-1] = replace(last, length=last.length + extent.length)
        elif extent.length:
            steps.append(extent)
    return steps


def _is_next(first: Extent, second: Extent) -> bool:
    return first.path == second.path and first.offset + first.length == second.offset


def _write(
    sink: Sink, steps: list[Step], values: Iterator[Tensor], hashes: Hashes | None
) -> Iterator[int]:
    for step in steps:
        if isinstance(step, Extent):
            yield from sink.copy(step)
        else:
            data = bytes_of(next(values))
            sink.write(data)
            if hashes is not None:
                # The disk is busy meanwhile.
                hashes.update(data)
            yield len(data)


def _values(
    source: TensorSource, specs: Mapping[str, Spec], keys: list[str], compute: Compute
) -> Generator[Tensor, None, None]:
    if isinstance(source, DictSource):
        # Nothing is to be computed: a worker would take longer to be asked than to answer.
        yield from (stored(source, key) for key in keys)
        return
    yield from ordered_map(
        lambda key: stored(source, key), keys, compute=compute, cost=_cost(source, specs)
    )


def _cost(source: TensorSource, specs: Mapping[str, Spec]) -> Callable[[str], int]:
    """Return the bytes that computing a tensor takes: what the source says, or four times fp32."""
    asked: Callable[[str], int] | None = getattr(source, "bytes_an_element", None)
    return lambda key: (asked(key) if asked else 16) * specs[key].numel
