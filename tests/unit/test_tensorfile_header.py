"""The header: what safetensors writes is read, and everything else is refused in one sentence."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import FileFormatError, OutputError
from lorakit.tensorfile.header import (
    DTYPE_BITS,
    Spec,
    format_header,
    layout,
    read_header,
    read_scalars,
    save_order,
)


def write_raw(folder: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "raw.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_file_of_safetensors_is_read_in_the_order_of_its_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"half": torch.zeros(2, 3).half(), "long": torch.zeros(5, dtype=torch.int64)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert list(header.specs) == ["long", "half"]
    assert header.specs["half"] == Spec("F16", (2, 3))
    assert header.metadata == {"format": "pt"}
    assert header.size == path.stat().st_size
    assert header.extents["long"].offset == header.data_start
    assert header.extents["half"].offset == header.data_start + 40
    assert header.extents["half"].length == 12


def test_the_order_is_that_of_the_bytes_also_where_the_json_has_another(tmp_path):
    header = {"b": entry(offsets=(4, 8)), "a": entry(offsets=(0, 4))}
    assert list(read_header(write_raw(tmp_path, header, bytes(8))).specs) == ["a", "b"]


def test_zero_size_tensors_and_files_without_tensors_are_read(tmp_path):
    header = {"a": entry(), "none": entry(shape=(0, 7), offsets=(4, 4)), "b": entry(offsets=(4, 8))}
    assert list(read_header(write_raw(tmp_path, header, bytes(8))).specs) == ["a", "none", "b"]
    assert not read_header(write_raw(tmp_path, {})).specs


DAMAGED = {
    "unknown dtype": ({"a": entry(dtype="F13")}, bytes(4), "dtype"),
    "dtype is no text": ({"a": entry(dtype=["F32"])}, bytes(4), "dtype"),
    "negative shape": ({"a": entry(shape=(-1,))}, bytes(4), "shape"),
    "boolean shape": ({"a": entry(shape=(True,))}, bytes(4), "shape"),
    "fractional shape": ({"a": entry(shape=(1.0,))}, bytes(4), "shape"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "shape"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(4), "data_offsets"),
    "negative offset": ({"a": entry(offsets=(-4, 0))}, bytes(4), "data_offsets"),
    "size and shape differ": ({"a": entry(shape=(2,))}, bytes(4), "8 bytes"),
    "end before begin": ({"a": entry(offsets=(4, 0))}, bytes(4), "4 bytes"),
    "overflow": ({"a": entry(shape=(2**40, 2**40))}, bytes(4), "elements"),
    "overflow behind a zero": (
        {"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))},
        b"",
        "elements",
    ),
    "hole": ({"a": entry(offsets=(4, 8))}, bytes(8), "hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6), "overlap"),
    "same place twice": ({"a": entry(), "b": entry()}, bytes(4), "overlap"),
    "cut off": ({"a": entry()}, bytes(3), "cut off"),
    "trailing bytes": ({"a": entry()}, bytes(5), "1 more"),
    "half a byte": ({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, bytes(1), "take"),
    "metadata is a list": ({"__metadata__": ["x"]}, b"", "__metadata__"),
    "metadata is no text": ({"__metadata__": {"epoch": 3}}, b"", "epoch"),
    "entry is a list": ({"a": [1]}, b"", "dtype"),
    "a list": ([1, 2], b"", "object"),
    "not JSON": (b"{]", b"", "broken JSON"),
    "NaN": (b'{"a":NaN}', b"", "NaN"),
    "not UTF-8": (b'{"\xff\xfe":1}', b"", "Unicode"),
    "half a surrogate": (b'{"\\ud800":1}', b"", "Unicode"),
    "a key twice": (b'{"x":1,"a":1,"y":2,"a":2}', b"", "'a' twice"),
    "nested deeply": (b"[" * 200_000, b"", "deep"),
    "a number of many digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "JSON"),
}


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.replace(" ", "-"))
def test_a_damaged_header_is_refused_by_file_and_reason(tmp_path, case):
    header, data, reason = DAMAGED[case]
    path = write_raw(tmp_path, header, data)
    with pytest.raises(FileFormatError) as caught:
        read_header(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: expected ")
    assert reason in sentence and ", found " in sentence and "; " in sentence
    assert "\n" not in sentence and len(sentence) < 500


WRONG_FILES = {
    "empty": (b"", "empty"),
    "five bytes": (b"12345", "5 bytes"),
    "header longer than the file": (struct.pack("<Q", 500) + b"{}", "500"),
    "header of an exabyte": (b"\xff" * 8 + b"{}", "header of at most"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(99), "dequantise"),
    "pickle": (b"PK\x03\x04\0\0\x08\x08" + bytes(99), "pickled"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(99), "web page"),
}


@pytest.mark.parametrize("case", WRONG_FILES, ids=lambda case: case.replace(" ", "-"))
def test_another_kind_of_file_is_named(tmp_path, case):
    content, reason = WRONG_FILES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=reason) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: expected ")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileFormatError, match="nothing there"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(FileFormatError, match="found a folder"):
        read_header(tmp_path)


def test_a_giant_header_length_allocates_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "giant.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**40) + b"{}")
        file.truncate(2**41)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileFormatError, match="header of at most"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15


def test_the_header_needs_neither_torch_nor_numpy():
    code = (
        "import sys, lorakit.tensorfile.header\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_dtypes_are_those_of_safetensors():
    assert DTYPE_BITS["BF16"] == 16 and DTYPE_BITS["F4"] == 4 and DTYPE_BITS["C64"] == 64
    assert Spec("F4", (3, 4)).nbytes == 6
    assert Spec("F32", ()).numel == 1


def test_a_format_that_cannot_be_stored_is_refused():
    with pytest.raises(OutputError, match="__metadata__"):
        format_header({"__metadata__": Spec("F32", ())}, {})
    with pytest.raises(OutputError, match="epoch"):
        format_header({}, {"epoch": 3})
    with pytest.raises(OutputError, match="Unicode"):
        format_header({"\ud800": Spec("F32", ())}, {})
    with pytest.raises(OutputError, match="at most"):
        format_header({}, {"tags": "x" * 100_000_001})


def test_the_given_order_is_kept_unless_a_tensor_would_lie_off_its_grid():
    kept = {"b": Spec("F16", (2,)), "a": Spec("F32", (1,))}
    assert layout(kept) == ["b", "a"]
    off = {"b": Spec("F16", (1,)), "a": Spec("F32", (1,))}
    assert layout(off) == save_order(off) == ["a", "b"]


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "uint16"]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scalar_is_read_without_torch(tmp_path, dtype, shape):
    path = tmp_path / "a.safetensors"
    save_file({"alpha": torch.full(shape, 12, dtype=getattr(torch, dtype))}, path)
    header = read_header(path)
    assert read_scalars(path, header, ["alpha"]) == {"alpha": 12.0}


def test_what_is_no_scalar_is_left_out(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"two": torch.zeros(2), "flag": torch.tensor(True), "none": torch.zeros(0)}, path)
    header = read_header(path)
    assert read_scalars(path, header, header.specs) == {}
