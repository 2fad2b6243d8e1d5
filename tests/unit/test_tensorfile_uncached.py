"""Files larger than half of the memory: the same bytes, past the page cache."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorakit.errors import FileFormatError
from lorakit.tensorfile import uncached
from lorakit.tensorfile.reading import open_regular, read_exactly
from tests.helpers import ran

SIZE = 100_003
SECTOR = 4096


def direct(folder: Path) -> bool:
    """Tell whether files there can be read past the page cache."""
    path = folder / "probe"
    path.write_bytes(bytes(SECTOR))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        return False
    return True


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, bytes]]:
    """Make a file, and a machine with no memory; where it can be, it is read past the cache."""
    data = os.urandom(SIZE)
    path = tmp_path / "large.bin"
    path.write_bytes(data)
    monkeypatch.setattr(uncached, "_memory", lambda: 0)
    monkeypatch.setattr(uncached, "_CHUNK", 2 * SECTOR)
    uncached._own.__dict__.pop("room", None)
    yield path, data
    uncached._own.__dict__.pop("room", None)


def read(path: Path, start: int, count: int) -> tuple[bytes, int]:
    """Return some bytes, and where the file stands behind them."""
    buffer = bytearray(count)
    with open_regular(path) as file:
        file.seek(start)
        read_exactly(file, path, memoryview(buffer))
        return bytes(buffer), file.tell()


@pytest.mark.parametrize("start", [0, 1, SECTOR - 1, SECTOR, 3 * SECTOR + 5, SIZE - 1, SIZE])
@pytest.mark.parametrize("count", [0, 1, SECTOR, 2 * SECTOR, 2 * SECTOR + 1, SIZE])
def test_bytes_are_those_of_the_file_wherever_they_begin_and_end(
    large: tuple[Path, bytes], start: int, count: int
) -> None:
    path, data = large
    count = min(count, SIZE - start)
    assert read(path, start, count) == (data[start : start + count], start + count)


def test_what_is_read_comes_past_the_cache(
    large: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = large
    if not direct(path.parent):
        pytest.skip("this folder cannot be read past the page cache")

    buffer = bytearray(SIZE - 7)
    with open_regular(path) as file:
        file.seek(7)
        done = uncached.read_uncached(file, memoryview(buffer))
        assert 0 < done <= 2 * SECTOR and file.tell() == 7 + done
    assert buffer[:done] == data[7 : 7 + done]
    monkeypatch.undo()
    with open_regular(path) as file:
        assert uncached.read_uncached(file, memoryview(buffer)) == 0, "it is small"


def test_a_file_that_ends_too_early_is_named(large: tuple[Path, bytes]) -> None:
    with pytest.raises(FileFormatError, match=r"large\.bin: expected 1 more bytes, found the end"):
        read(large[0], 10, SIZE - 9)


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_system_that_refuses_is_read_from_as_before(
    large: tuple[Path, bytes], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[object] = []

    def refuse(*arguments: object) -> int:
        refused.append(arguments)
        raise OSError(errno.EINVAL, "no direct reads here")

    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no direct reads")
    monkeypatch.setattr(os, call, refuse)
    assert read(large[0], 5, SIZE - 5)[0] == large[1][5:]
    assert refused or not direct(large[0].parent)


def test_another_file_of_that_name_is_not_read(large: tuple[Path, bytes]) -> None:
    path, data = large
    buffer = bytearray(SIZE)
    with open_regular(path) as file:
        path.rename(path.with_name("elsewhere.bin"))
        path.write_bytes(bytes(SIZE))
        read_exactly(file, path, memoryview(buffer))
    assert buffer == data


def test_threads_have_rooms_of_their_own(large: tuple[Path, bytes]) -> None:
    path, data = large
    starts = range(0, SIZE - 9000, 1111)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: read(path, start, 9000)[0], starts))
    assert found == [data[start : start + 9000] for start in starts]


def test_a_bake_has_the_same_bytes(
    sd15: Path, sd15_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for place, memory in enumerate((2**60, 0)):
        monkeypatch.setattr(uncached, "_memory", lambda memory=memory: memory)
        ran("merge", sd15_lora, "--into", sd15, "-o", tmp_path / f"{place}.safetensors")
        written.append((tmp_path / f"{place}.safetensors").read_bytes())
    assert written[0] == written[1]
