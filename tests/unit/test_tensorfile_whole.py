"""A file read at once: the tensors and the hash that reading one after another gives."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import FileFormatError
from lorakit.tensorfile import whole
from lorakit.tensorfile.metadata import model_hash
from lorakit.tensorfile.plain import DictSource, FileSource, TensorSource
from lorakit.tensorfile.source import open_source
from lorakit.tensorfile.whole import Whole, in_memory
from lorakit.tensorfile.writer import write_safetensors
from tests.helpers import lies_in, needs_maps

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): (torch.rand(7, 5, generator=g) * 9).to(dtype)
        for dtype in DTYPES
    }
    tensors |= {"none": torch.empty(0, 3), "number": torch.tensor(2.5)}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    return path


def read(source: TensorSource, *, mapped: bool = False) -> tuple[TensorSource, str]:
    with ThreadPoolExecutor(1) as worker:
        found, hashed = in_memory(source, worker, mapped=mapped)
        return found, hashed.result()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("block", [2**23, 64, 100])
def test_every_tensor_and_the_hash_are_those_of_the_file(
    file: Path, block: int, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "_BLOCK", block)
    source = open_source(file)
    found, hashed = read(source, mapped=mapped)
    assert isinstance(found, Whole)
    assert (found.name, found.specs, found.metadata) == (
        source.name,
        source.specs,
        source.metadata,
    )
    for key in source.specs:
        assert torch.equal(found.get(key), source.get(key)), key
        assert found.get(key).dtype == source.get(key).dtype
        assert found.extent(key) == source.extent(key)
    assert isinstance(source, FileSource)
    assert hashed == model_hash(source)
    assert hashed == hashlib.sha256(file.read_bytes()[source.header.data_start :]).hexdigest()


def test_the_tensors_share_the_one_buffer(file: Path) -> None:
    found, _ = read(open_source(file))
    first, second = (found.get(key).untyped_storage().data_ptr() for key in ("float16", "float64"))
    assert first == second == found.get("int8").untyped_storage().data_ptr()


def is_mapped(found: TensorSource) -> bool:
    assert isinstance(found, Whole)
    return lies_in(found.data, Path(found.name))


@needs_maps
def test_a_mapped_file_is_not_copied_and_nothing_written_reaches_it(file: Path) -> None:
    before = file.read_bytes()
    found, _ = read(open_source(file), mapped=True)
    assert is_mapped(found)
    assert not is_mapped(read(open_source(file))[0])
    found.get("float32").zero_()
    assert not found.get("float32").any()
    assert file.read_bytes() == before


@needs_maps
def test_a_mapped_file_may_be_replaced_and_deleted(file: Path) -> None:
    found, _ = read(open_source(file), mapped=True)
    expected = found.get("float32").clone()
    save_file({"float32": torch.ones(7, 5)}, other := file.with_name("other"))
    other.replace(file)
    assert torch.equal(found.get("float32"), expected)
    file.unlink()
    assert torch.equal(found.get("float32"), expected)


@needs_maps
def test_what_cannot_be_mapped_well_is_copied(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no mapped file can be replaced, off the grid, and what the page cache cannot hold."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    shifted = tmp_path / "shifted.safetensors"
    header = raw[8 : 8 + size].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    shifted.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    found, hashed = read(open_source(shifted), mapped=True)
    assert not is_mapped(found)
    assert hashed == read(open_source(file))[1]
    with monkeypatch.context() as patch:
        patch.setattr(whole, "is_uncached", lambda _: True)
        assert not is_mapped(read(open_source(file), mapped=True)[0])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_file", refuse)
        assert not is_mapped(read(open_source(file), mapped=True)[0])
    monkeypatch.setattr(whole, "_MAPS", False)
    assert not is_mapped(read(open_source(file), mapped=True)[0])


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("this file system maps nothing")


def test_what_is_no_file_and_what_is_off_the_grid_is_read_as_before(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2)}
    memory = DictSource(tensors)
    assert read(memory) == (memory, model_hash(memory))
    path = tmp_path / "odd.safetensors"
    header = (
        b'{"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    values = tensors["a"].numpy().tobytes() + tensors["b"].numpy().tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    odd = open_source(path)
    found, hashed = read(odd)
    assert found is odd
    assert hashed == model_hash(odd)
    assert torch.equal(found.get("b"), tensors["b"])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_of_no_bytes_is_read(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "none.safetensors"
    write_safetensors(path, DictSource({"none": torch.empty(0, 3)}))
    found, hashed = read(open_source(path), mapped=mapped)
    assert found.get("none").shape == (0, 3)
    assert hashed == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_was_changed_since_its_header_was_read_is_refused(
    file: Path, mapped: bool
) -> None:
    source = open_source(file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(FileFormatError, match="another program changed it meanwhile"):
        read(source, mapped=mapped)
