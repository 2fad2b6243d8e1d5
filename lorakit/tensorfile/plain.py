"""Sources of tensors that one file or one dict holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from lorakit.errors import FileFormatError
from lorakit.tensorfile.dtypes import bytes_of, empty, spec_of
from lorakit.tensorfile.extents import check_unchanged_file, opened
from lorakit.tensorfile.header import Extent, Header, Spec, read_header
from lorakit.tensorfile.reading import read_exactly, reading


class TensorSource(Protocol):
    """Tensors by key, read one at a time: a file, a folder, a dict, or a model on paper.

    A source that is derived from another has it as `base`, with the same keys; the writer looks
    there for the files and for values that were not finite before.
    """

    @property
    def name(self) -> str:
        """What error sentences call it: its path."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of each key, in the order of the file."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The text beside the tensors."""

    def get(self, key: str) -> Tensor:
        """Read a tensor to the CPU, into memory of its own; safe to call from many threads."""

    def extent(self, key: str) -> Extent | None:
        """Tell where the stored bytes lie, None where they are computed or only in memory."""


def root_of(source: TensorSource) -> TensorSource:
    """Return the stored source that a chain of derived ones begins with."""
    while (base := getattr(source, "base", None)) is not None:
        source = base
    return source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FileSource:
    """A safetensors file; nothing of it stays open or mapped between two reads."""

    path: Path
    header: Header

    @staticmethod
    def of(path: str | Path) -> "FileSource":
        """Read a file's header.

        Raises:
            FileFormatError: it is no safetensors file.
        """
        return FileSource(path=Path(path), header=read_header(path))

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of each key, in the order of the file."""
        return self.header.specs

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's metadata."""
        return self.header.metadata

    def get(self, key: str) -> Tensor:
        """Read a tensor.

        Raises:
            FileFormatError: the file cannot be read, has changed, or torch lacks the dtype.
        """
        extent = self.header.extents[key]
        try:
            tensor = empty(self.specs[key])
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: {key}: {error}") from None
        with opened(extent) as file, reading(extent.path):
            read_exactly(file, extent.path, bytes_of(tensor))
        return tensor

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie."""
        return self.header.extents[key]

    def check_unchanged(self) -> None:
        """Check that the file is the one whose header was read.

        Raises:
            FileFormatError: it is another one, or was written to.
        """
        check_unchanged_file(self.path, self.header.stamp)


def check_unchanged(source: TensorSource) -> None:
    """Check that the files that a source reads are those that it began with.

    Raises:
        FileFormatError: one of them changed.
    """
    root = root_of(source)
    parts: Mapping[str, TensorSource] = getattr(root, "parts", None) or {"": root}
    for part in parts.values():
        if isinstance(part, FileSource):
            part.check_unchanged()


class DictSource:
    """Tensors in memory; `get` returns copies, unless they are lent to what only reads them.

    A file of those that are `hashed` tells its own hashes.

    Raises:
        FileFormatError: a value is no dense tensor, or safetensors lacks its dtype.
    """

    __slots__ = ("_lent", "_tensors", "hashed", "metadata", "name", "specs")

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        name: str = "memory",
        *,
        lent: bool = False,
        hashed: bool = False,
    ) -> None:
        self._tensors = dict(tensors)
        self._lent = lent
        self.hashed = hashed
        self.name: str = name
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.specs: Mapping[str, Spec] = MappingProxyType(
            {key: _spec(name, key, tensor) for key, tensor in self._tensors.items()}
        )

    def get(self, key: str) -> Tensor:
        """Copy a tensor, or lend it."""
        tensor = self._tensors[key].detach()
        if self._lent:
            return tensor.cpu().contiguous()
        return tensor.clone(memory_format=torch.contiguous_format).cpu()

    def extent(self, key: str) -> Extent | None:
        """Return None: there is no file."""
        return None


def _spec(name: str, key: object, tensor: object) -> Spec:
    if not isinstance(key, str) or not isinstance(tensor, Tensor):
        kinds = f"{type(key).__name__}: {type(tensor).__name__}"
        raise FileFormatError(
            f"{name}: expected tensors by name, found {kinds} at {key!r}; leave that entry out."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise FileFormatError(
            f"{name}: {key}: expected a dense tensor, found a sparse or quantised one; "
            "convert it first."
        )
    try:
        return spec_of(tensor)
    except FileFormatError as error:
        raise FileFormatError(f"{name}: {key}: {error}") from None
