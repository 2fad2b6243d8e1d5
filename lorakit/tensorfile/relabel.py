"""A file's metadata, replaced: another header before the same bytes of tensors; without torch."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import OutputError
from lorakit.progress import Progress, silent
from lorakit.tensorfile.copying import check_size, copy_extent, write_all
from lorakit.tensorfile.extents import check_unchanged_file, chunks_of
from lorakit.tensorfile.hashes import LEGACY_HASH, MODEL_HASH, SPEC_HASH, WINDOW, with_place
from lorakit.tensorfile.header import Extent, Header, format_header, read_header
from lorakit.tensorfile.replacing import check_space, replaced_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A file as it lies on disk."""

    path: Path
    header: Header

    @property
    def data(self) -> Extent:
        """The bytes of all tensors, in the order of the file."""
        start = self.header.data_start
        return Extent(self.path, start, self.header.size - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hash:
    """A hash of a file: its key, what is stored, what the bytes have, whether they agree.

    `right` is None where nothing is stored.
    """

    key: str
    stored: str | None
    found: str
    right: bool | None

    @property
    def verdict(self) -> str:
        """One word: absent, right or wrong."""
        return "absent" if self.right is None else "right" if self.right else "wrong"


def open_stored(path: Path) -> Stored:
    """Read a file's header.

    Raises:
        FileFormatError: it is no safetensors file.
    """
    return Stored(path=path, header=read_header(path))


def rewritten(
    file: Stored,
    metadata: Mapping[str, str],
    *,
    place: Path,
    verify: bool = False,
    progress: Progress = silent,
) -> tuple[int, Mapping[str, str]]:
    """Write a file with other metadata; the tensors' bytes are copied by the kernel.

    The hash of the tensors stays true by itself; that of a part of the file, where it is there, is
    made true, or left out where that part would hold it.

    Args:
        file: the file.
        metadata: all of the new metadata.
        place: where to write; the file itself is replaced at once, when all is written.
        verify: read it back before that.
        progress: told the bytes written.

    Returns:
        The bytes of the new file, and its metadata.

    Raises:
        OutputError: it cannot be written, or is not what was written.
        FileFormatError: the file cannot be read whole.
    """
    told = _with_legacy_hash(file, metadata)
    head = format_header(file.header.specs, told)
    total = len(head) + file.data.length
    check_space(place, place, total)
    with replaced_file(place) as output:
        write_all(output, head)
        done = len(head)
        for amount in copy_extent(file.data, output):
            done += amount
            progress("bytes written", done, total)
        check_size(output, total)
        check_unchanged_file(file.path, file.header.stamp)
        if verify:
            _check_same(file, told, Path(output.name), place)
    return total, told


def with_hashes(file: Stored, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata whose hashes of the tensors are true, with a place for the legacy one.

    Cost: one pass over the data.
    """
    tensors = tensors_hash(file)
    hashed = {**metadata, MODEL_HASH: tensors, LEGACY_HASH: "0" * 8}
    return hashed | ({SPEC_HASH: f"0x{tensors}"} if SPEC_HASH in metadata else {})


def check_hashes(file: Stored) -> tuple[Hash, ...]:
    """Compare the hashes that a file stores with those that its bytes have.

    Source: kohya's `precalculate_safetensors_hashes`, modelspec's `hash_sha256`.
        - kohya's legacy hash is of the file without metadata but `ss_…`; that is right too

    Cost: one pass over the data.
    """
    told, tensors = file.header.metadata, tensors_hash(file)
    start = WINDOW[0]
    legacy = _digest(_window(b"", Extent(file.path, 0, file.header.size), start))[:8]
    found = {MODEL_HASH: tensors, LEGACY_HASH: legacy}
    found |= {SPEC_HASH: f"0x{tensors}"} if SPEC_HASH in told else {}
    return tuple(
        Hash(key=key, stored=told.get(key), found=value, right=_agrees(file, key, value))
        for key, value in found.items()
    )


def tensors_hash(file: Stored) -> str:
    """Return the SHA-256 of the bytes after the header: Civitai's AutoV3."""
    return _digest(chunks_of(file.data))


def _agrees(file: Stored, key: str, found: str) -> bool | None:
    stored = file.header.metadata.get(key)
    if stored is None:
        return None
    if key == LEGACY_HASH:
        return stored in (found, _as_kohya(file))
    return stored.lower().removeprefix("0x") == found.removeprefix("0x")


def _as_kohya(file: Stored) -> str:
    """Return the legacy hash of the same tensors below a header of training metadata alone."""
    trained = {key: text for key, text in file.header.metadata.items() if key.startswith("ss_")}
    head = format_header(file.header.specs, trained)
    return _digest(_window(head, file.data, WINDOW[0]))[:8]


def _with_legacy_hash(file: Stored, metadata: Mapping[str, str]) -> dict[str, str]:
    if LEGACY_HASH not in metadata:
        return dict(metadata)
    told, head = with_place(file.header.specs, metadata)
    if LEGACY_HASH not in told:
        return told
    return told | {LEGACY_HASH: _digest(_window(head, file.data, WINDOW[0]))[:8]}


def _check_same(file: Stored, told: Mapping[str, str], written: Path, place: Path) -> None:
    """Check that a written file has the tensors of another, and the metadata that it was told."""
    found = open_stored(written)
    same = found.header.specs == file.header.specs and found.header.metadata == told
    if not (same and tensors_hash(found) == tensors_hash(file)):
        raise OutputError(
            f"{place}: expected the bytes that were written, found others; someone else changed "
            "the file or the disk is failing, write it again."
        )


def _window(head: bytes, data: Extent, start: int) -> Iterator[bytes | memoryview]:
    """Yield 64 KiB of what `head` and an extent make together, fewer where they end before."""
    length = WINDOW[1] - WINDOW[0]
    yield head[start : start + length]
    first = max(0, start - len(head))
    last = min(data.length, max(0, start + length - len(head)))
    if first < last:
        yield from chunks_of(Extent(data.path, data.offset + first, last - first))


def _digest(parts: Iterator[bytes | memoryview] | Iterator[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
