"""A tensor block by block: what is looked at once needs no memory of its own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lorakit.tensorfile.dtypes import bytes_of, torch_dtype
from lorakit.tensorfile.extents import opened
from lorakit.tensorfile.plain import TensorSource
from lorakit.tensorfile.reading import read_exactly, reading

BLOCK = 2**17
"""Elements: in their stored dtype and in fp32, those of two models stay in the cache."""


def blocks(source: TensorSource, key: str, start: int, stop: int) -> Iterator[Tensor]:
    """Yield some elements of a tensor in the order in which they are stored, `BLOCK` at a time.

    Args:
        source: the tensor's source; a stored tensor is read as it is asked for.
        key: the tensor's.
        start: its first element.
        stop: the one after its last.

    Yields:
        Each block in the stored dtype, good until the next one is asked for.

    Raises:
        FileFormatError: the file cannot be read, or has changed.
    """
    extent = source.extent(key)
    if extent is None:
        yield from torch.split(source.get(key).reshape(-1)[start:stop], BLOCK)
        return
    room = torch.empty(min(BLOCK, stop - start), dtype=torch_dtype(source.specs[key].dtype))
    with opened(extent) as file, reading(extent.path):
        file.seek(extent.offset + start * room.element_size())
        for first in range(start, stop, BLOCK):
            block = room[: min(BLOCK, stop - first)]
            read_exactly(file, extent.path, bytes_of(block))
            yield block
