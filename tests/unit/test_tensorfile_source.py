"""Sources: what is stored is what is read, into memory of its own."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import DTYPE_BITS, Extent, Spec
from lorakit.tensorfile.source import (
    DictSource,
    FileSource,
    dtype_name,
    open_source,
    spec_of,
    torch_dtype,
)

DTYPES = [name for name in DTYPE_BITS if not name.startswith("F6")]


def sample(name: str) -> torch.Tensor:
    dtype = torch_dtype(name)
    if name == "BOOL":
        return torch.tensor([[True, False, True], [False, True, True]])
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8) + 1
    return raw.view(dtype).reshape(2, 3).clone()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_bit_for_bit(tmp_path, name):
    path = tmp_path / "a.safetensors"
    tensors = {"x": sample(name), "empty": sample(name)[:0].clone()}
    if name != "F4":
        tensors["scalar"] = sample(name)[0, 0].clone()
    save_file(tensors, path)
    source = open_source(path)
    assert isinstance(source, FileSource)
    for key, tensor in tensors.items():
        got = source.get(key)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert raw(got) == raw(tensor)
        assert source.specs[key] == spec_of(tensor) == DictSource(tensors).specs[key]
        assert source.specs[key].dtype == name == dtype_name(tensor.dtype)


def test_a_read_tensor_is_its_readers_own(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4)}, path)
    source = open_source(path)
    source.get("x").zero_()
    assert source.get("x").sum() == 4
    given = torch.ones(2, 3)
    view = DictSource({"x": given.T})
    view.get("x").zero_()
    assert given.sum() == 6 and view.get("x").is_contiguous()


def test_the_extent_is_where_the_bytes_lie(tmp_path):
    path = tmp_path / "a.safetensors"
    tensor = torch.arange(7.0)
    save_file({"x": tensor, "a": torch.zeros(3)}, path)
    extent = open_source(path).extent("x")
    assert extent is not None and extent.path == path
    content = path.read_bytes()
    assert content[extent.offset : extent.offset + extent.length] == raw(tensor)
    assert DictSource({"x": tensor}).extent("x") is None


def test_many_threads_may_read_at_once(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({str(i): torch.full((1000,), float(i)) for i in range(20)}, path)
    source = open_source(path)
    wrong: list[str] = []

    def read() -> None:
        for i in range(20):
            if not bool((source.get(str(i)) == i).all()):
                wrong.append(str(i))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_changed_since_it_was_opened_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    source = open_source(path)
    save_file({"x": torch.zeros(101)}, path)
    with pytest.raises(FileFormatError, match="changed"):
        source.get("x")
    path.unlink()
    with pytest.raises(FileFormatError, match="nothing there"):
        source.get("x")


def test_a_dtype_that_torch_lacks_is_listed_and_refused_only_when_read(tmp_path):
    import json
    import struct

    text = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path = tmp_path / "six.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(3))
    source = open_source(path)
    assert source.specs["x"] == Spec("F6_E2M3", (4,))
    assert source.extent("x") == Extent(path, 8 + len(text), 3)
    with pytest.raises(FileFormatError, match=r"six\.safetensors: x: .*F6_E2M3"):
        source.get("x")


def test_the_content_decides_and_not_the_ending(tmp_path):
    path = tmp_path / "model.ckpt"
    save_file({"x": torch.ones(2)}, path)
    assert isinstance(open_source(str(path)), FileSource)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GGUF\x03\0\0\0" + bytes(99), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<html><body>Sign in</body></html>", "web page"),
        (b'{"weight_map": {}}', "weight_map"),
    ],
)
def test_what_no_source_can_be_is_refused(tmp_path, content, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=reason) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path))


def test_a_dict_is_a_source_and_what_is_no_tensor_in_it_is_refused():
    assert open_source({"x": torch.ones(2)}).specs == {"x": Spec("F32", (2,))}
    with pytest.raises(FileFormatError, match="memory: expected tensors by name"):
        DictSource({"x": 3})
    with pytest.raises(FileFormatError, match="dense"):
        DictSource({"x": torch.eye(2).to_sparse()})
    with pytest.raises(FileFormatError, match="complex128"):
        DictSource({"x": torch.zeros(1, dtype=torch.complex128)})


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os = pytest.importorskip("os")
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in the file system here")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="pipe"):
        open_source(Path(tmp_path / "pipe"))
