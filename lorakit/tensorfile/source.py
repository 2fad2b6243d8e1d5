"""Where tensors come from: `open_source`, and the sources that it opens."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorakit.tensorfile.dtypes import dtype_name, spec_of, torch_dtype
from lorakit.tensorfile.multifile import (
    MultiFileSource,
    index_of_shard,
    open_folder,
    open_shards,
)
from lorakit.tensorfile.pickles import PickleSource
from lorakit.tensorfile.plain import DictSource, FileSource, TensorSource, root_of
from lorakit.tensorfile.reading import file_size, is_pickle, is_safetensors, open_regular, reading

__all__ = [
    "DictSource",
    "FileSource",
    "MultiFileSource",
    "PickleSource",
    "TensorSource",
    "dtype_name",
    "open_source",
    "root_of",
    "spec_of",
    "torch_dtype",
]


def open_source(place: str | Path | Mapping[str, Tensor]) -> TensorSource:
    """Open a file, a set of shards, a folder or a dict; what a file is, its content says.

    Args:
        place: a safetensors or pickled file, an index or one part of a sharded set, a diffusers
            or transformers folder, or tensors by key.

    Raises:
        FileFormatError: it is none of these, or a damaged one.
    """
    if isinstance(place, Mapping):
        return DictSource(place)
    path = Path(place)
    if path.is_dir():
        return open_folder(path)
    with open_regular(path) as file, reading(path):
        size = file_size(file)
        start = file.read(64)
    if is_safetensors(start, size):
        index = index_of_shard(path)
        return FileSource.of(path) if index is None else open_shards(index)
    if start.lstrip()[:1] == b"{":
        return open_shards(path)
    return PickleSource(path) if is_pickle(start) else FileSource.of(path)
