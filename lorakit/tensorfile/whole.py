"""A file read at once: its tensors are views of one buffer, or of its pages, hashed meanwhile."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.tensorfile.dtypes import bytes_of, torch_dtype
from lorakit.tensorfile.extents import opened
from lorakit.tensorfile.header import Extent, Spec, layout
from lorakit.tensorfile.metadata import model_hash
from lorakit.tensorfile.plain import FileSource, TensorSource
from lorakit.tensorfile.reading import read_exactly, reading
from lorakit.tensorfile.uncached import is_uncached

_BLOCK = 2**23
_GRID = 8
"""Bytes: where a header ends off it, tensors would begin off the grid of their dtype."""
_MAPS = os.name == "posix"
"""Windows replaces and deletes no file that is mapped."""
_HALVES = ("F4",)
"""Dtypes whose elements share a byte: torch shapes them otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """A file whose bytes are all in memory; every `get` of a tensor shares them.

    Args:
        source: the file.
        data: the bytes behind its header.
    """

    source: FileSource
    data: Tensor

    @property
    def name(self) -> str:
        """The path."""
        return self.source.name

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The file's specs."""
        return self.source.specs

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata."""
        return self.source.metadata

    def get(self, key: str) -> Tensor:
        """Return a tensor that shares its bytes with the buffer."""
        spec, header = self.specs[key], self.source.header
        if not spec.nbytes or spec.dtype in _HALVES:
            return self.source.get(key)
        start = header.extents[key].offset - header.data_start
        stored = self.data[start : start + spec.nbytes]
        return stored.view(torch_dtype(spec.dtype)).reshape(spec.shape)

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie."""
        return self.source.extent(key)


def in_memory(
    source: TensorSource, worker: Executor, *, mapped: bool = False
) -> tuple[TensorSource, Future[str]]:
    """Read a safetensors file at once, and hash it meanwhile; other sources stay as they are.

    A tensor at a time takes twice as long for a LoRA, of thousands of small ones.

    Args:
        source: what is read as a whole.
        worker: of one thread; what it is given it does in order.
        mapped: share the pages that the system keeps of the file instead of copying them, where
            that can be done. The file must then not be written to in place.

    Returns:
        The source, and the SHA-256 of the tensors' bytes: see `metadata.model_hash`.

    Raises:
        FileFormatError: the file cannot be read, or has changed.
    """
    if not isinstance(source, FileSource) or layout(source.specs) != list(source.specs):
        return source, worker.submit(model_hash, source)
    header = source.header
    size = header.size - header.data_start
    digest = hashlib.sha256()
    everything = Extent(source.path, header.data_start, size, header.stamp)
    with opened(everything) as file, reading(source.path):
        shared = _mapped(source) if mapped and not is_uncached(file) else None
        data = torch.empty(size, dtype=torch.uint8) if shared is None else shared
        # A page that cannot be read ends the process; a read says so, and brings the page.
        room = None if shared is None else memoryview(bytearray(min(size, _BLOCK)))
        for start in range(0, size, _BLOCK):
            block = bytes_of(data[start : start + _BLOCK])
            read_exactly(file, source.path, block if room is None else room[: len(block)])
            worker.submit(digest.update, block)
    return Whole(source=source, data=data), worker.submit(digest.hexdigest)


def _mapped(source: FileSource) -> Tensor | None:
    """Return the bytes behind a header as the file's own pages, None where that cannot be.

    What is written to them stays in the process. The file is not kept open.
    """
    header = source.header
    if not _MAPS or header.data_start % _GRID:
        return None
    with suppress(RuntimeError):
        name = str(source.path)
        pages = torch.from_file(name, shared=False, size=header.size, dtype=torch.uint8)
        return pages[header.data_start :]
    return None
