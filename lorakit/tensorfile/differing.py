"""Where two written files or folders differ, byte for byte."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.plain import FileSource
from lorakit.tensorfile.reading import open_regular, read_exactly, reading

_BLOCK = 2**20


def differences(first: Path, second: Path) -> tuple[str, ...]:
    """Return the names of what differs: tensors, metadata, files; nothing where all bytes agree.

    Args:
        first: a safetensors file, or a folder; it may hold more files than the second.
        second: what it is compared with, of the same form.

    Raises:
        FileFormatError: one of them cannot be read.

    Cost: one read of both.
    """
    if not second.is_dir():
        return tuple(_in_tensors(first, second))
    files = sorted(file for file in second.rglob("*") if file.is_file())
    return tuple(name for file in files for name in _in_file(first, second, file))


def same_files(first: Path, second: Path) -> bool:
    """Tell whether two files have the same bytes.

    Raises:
        FileFormatError: one of them cannot be read.
    """
    return _same(_whole(first), _whole(second))


def count(names: Sequence[str]) -> str:
    """Say how much differs, and name the first."""
    one = len(names) == 1
    return f"in one place, {names[0]}" if one else f"in {len(names)} places, first {names[0]}"


def _in_file(first: Path, second: Path, file: Path) -> Iterator[str]:
    name = file.relative_to(second).as_posix()
    other = first / name
    if not other.is_file():
        yield name
    elif file.suffix == ".safetensors":
        yield from (f"{name}: {what}" for what in _in_tensors(other, file))
    elif not same_files(other, file):
        yield name


def _in_tensors(first: Path, second: Path) -> Iterator[str]:
    one, two = FileSource.of(first).header, FileSource.of(second).header
    keys = dict.fromkeys((*one.extents, *two.extents))
    odd = [
        key
        for key in keys
        if one.specs.get(key) != two.specs.get(key) or not _same(one.extents[key], two.extents[key])
    ]
    said = dict.fromkeys((*one.metadata, *two.metadata))
    odd += [f"metadata {key}" for key in said if one.metadata.get(key) != two.metadata.get(key)]
    heads = Extent(first, 0, one.data_start), Extent(second, 0, two.data_start)
    if not odd and not _same(*heads):
        odd.append("the header's spelling")
    yield from odd


def _whole(path: Path) -> Extent:
    with reading(path):
        return Extent(path, 0, path.stat().st_size)


def _same(first: Extent, second: Extent) -> bool:
    if first.length != second.length:
        return False
    pairs = zip(_blocks(first), _blocks(second), strict=True)
    return all(one == two for one, two in pairs)


def _blocks(extent: Extent) -> Iterator[bytearray]:
    with open_regular(extent.path) as file:
        with reading(extent.path):
            file.seek(extent.offset)
        for start in range(0, extent.length, _BLOCK):
            # A view would be compared element by element.
            block = bytearray(min(_BLOCK, extent.length - start))
            read_exactly(file, extent.path, memoryview(block))
            yield block
