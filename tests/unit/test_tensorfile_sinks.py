"""Bytes past the page cache: the same file, and the same failures, as through it."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import FileFormatError, OutputError
from lorakit.tensorfile import extents, sinks
from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.source import FileSource, open_source
from lorakit.tensorfile.writer import write_safetensors

BUFFER = 8192
DIRECT = getattr(os, "O_DIRECT", 0)

pytestmark = pytest.mark.skipif(not DIRECT, reason="the system has no direct writes")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "LEAST", 0)
    monkeypatch.setattr(sinks, "BUFFER", BUFFER)


@pytest.fixture
def base(tmp_path: Path) -> FileSource:
    path = tmp_path / "base.safetensors"
    save_file({f"l{i}": torch.arange(i * 900 + 1).half() for i in range(12)}, path)
    source = open_source(path)
    assert isinstance(source, FileSource)
    return source


class Read:
    """A source whose tensors are computed, not copied."""

    def __init__(self, base: FileSource) -> None:
        self.base, self.name = base, base.name
        self.specs, self.metadata, self.get = base.specs, base.metadata, base.get

    def extent(self, key: str) -> Extent | None:
        return self.base.extent(key) if key in ("l3", "l7", "l8") else None


def same(path: Path, base: FileSource) -> bool:
    return path.read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("whole", [True, False], ids=["copied", "computed and copied"])
@pytest.mark.parametrize("buffer", [4096, 8192, 2**20])
def test_the_bytes_are_those_of_the_plain_way(
    tmp_path: Path, base: FileSource, monkeypatch: pytest.MonkeyPatch, whole: bool, buffer: int
) -> None:
    monkeypatch.setattr(sinks, "BUFFER", buffer)
    write_safetensors(tmp_path / "out", base if whole else Read(base))
    assert same(tmp_path / "out", base)


@pytest.mark.parametrize("size", [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 5 * BUFFER])
def test_every_length_is_written_whole(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    with open(tmp_path / "out", "xb", buffering=0) as file, sinks.sink_of(file, size) as sink:
        for start in range(0, size, 3001):
            sink.write(data[start : start + 3001])
    assert bool((tmp_path / "out").read_bytes() == data)


@pytest.mark.parametrize("answer", [OSError(errno.EINVAL, "refused"), 4096])
def test_what_the_system_refuses_goes_the_plain_way(
    tmp_path: Path, base: FileSource, monkeypatch: pytest.MonkeyPatch, answer: OSError | int
) -> None:
    plain, refused = os.pwrite, set()

    def fake(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) < BUFFER or offset in refused:
            return plain(descriptor, data, offset)
        refused.add(offset)
        if isinstance(answer, OSError):
            raise answer
        return plain(descriptor, data[:answer], offset)

    monkeypatch.setattr(os, "pwrite", fake)
    write_safetensors(tmp_path / "out", base)
    assert same(tmp_path / "out", base) and len(refused) > 4


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.ENOSPC, "free some space"), (errno.EIO, "try another folder")]
)
def test_a_failing_disk_is_a_plain_sentence_and_leaves_nothing(
    tmp_path: Path, base: FileSource, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    def fail(*given: object) -> int:
        raise OSError(code, "The reason")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match=f"out: expected to write .*'The reason'; .*{hint}"):
        write_safetensors(tmp_path / "out", base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_file_system_without_direct_writes_is_written_plainly(
    tmp_path: Path, base: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, plain = [], os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & DIRECT:
            opened.append(path)
            raise OSError(errno.EINVAL, "no direct writes here")
        return plain(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    write_safetensors(tmp_path / "out", base)
    assert same(tmp_path / "out", base) and opened


def test_an_input_that_is_cut_off_while_it_is_read_is_named(
    tmp_path: Path, base: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it was when it was opened.
    monkeypatch.setattr(extents, "stamp_of", lambda file: base.header.stamp)
    with open(base.path, "r+b") as file:
        file.truncate(base.header.size - 5)
    with pytest.raises(FileFormatError, match=r"base\.safetensors: expected .* end of the"):
        write_safetensors(tmp_path / "out", base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_small_file_takes_the_plain_way(
    tmp_path: Path, base: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "LEAST", base.header.size + 1)
    monkeypatch.setattr(sinks, "Direct", None)
    write_safetensors(tmp_path / "out", base)
    assert same(tmp_path / "out", base)
