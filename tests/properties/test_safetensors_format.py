"""safetensors and lorakit agree: on what is a file, on what is in it, and on its bytes."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorakit.compute import Compute
from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import (
    DTYPE_BITS,
    Header,
    Spec,
    format_header,
    layout,
    read_header,
    save_order,
)
from lorakit.tensorfile.metadata import model_hash
from lorakit.tensorfile.source import DictSource, open_source, torch_dtype
from lorakit.tensorfile.writer import write_safetensors

PLAIN = sorted(name for name in DTYPE_BITS if name[:2] not in {"F4", "F6"})
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = TEXT.filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SPECS = st.builds(Spec, st.sampled_from(PLAIN), SHAPES)
LAYOUTS = st.dictionaries(NAMES, SPECS, max_size=6)
METADATA = st.dictionaries(TEXT, TEXT, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def fill(spec: Spec, seed: int) -> torch.Tensor:
    raw = (torch.arange(spec.nbytes) * 37 + seed).to(torch.uint8)
    if spec.dtype == "BOOL":
        raw %= 2
    return raw.view(torch_dtype(spec.dtype)).reshape(spec.shape)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    views = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(*views)


@settings(max_examples=60, deadline=None)
@given(specs=LAYOUTS, metadata=METADATA, seed=st.integers(0, 99))
def test_what_is_written_is_read_by_both(folder, specs, metadata, seed):
    tensors = {key: fill(spec, seed) for key, spec in specs.items()}
    path = folder / "written"
    write_safetensors(path, DictSource(tensors, metadata), overwrite=True, compute=Compute())
    source = open_source(path)
    assert dict(source.specs) == specs and dict(source.metadata) == metadata
    assert list(source.specs) == layout(specs)
    with safe_open(path, framework="pt") as theirs:
        assert sorted(theirs.keys()) == sorted(specs)
        for key, tensor in tensors.items():
            assert same(source.get(key), tensor) and same(theirs.get_tensor(key), tensor)


@settings(max_examples=60, deadline=None)
@given(specs=LAYOUTS, metadata=st.dictionaries(TEXT, TEXT, max_size=1), seed=st.integers(0, 99))
def test_the_bytes_are_safetensors_own(folder, specs, metadata, seed):
    tensors = {key: fill(spec, seed) for key, spec in specs.items()}
    theirs = save(tensors, metadata=metadata or None)
    ordered = {key: tensors[key] for key in save_order(specs)}
    path = folder / "ours"
    write_safetensors(path, DictSource(ordered, metadata), overwrite=True, compute=Compute())
    assert path.read_bytes() == theirs
    write_safetensors(folder / "copy", open_source(path), overwrite=True, compute=Compute())
    assert (folder / "copy").read_bytes() == theirs
    assert model_hash(open_source(path)) == model_hash(DictSource(ordered))


def attempt(path: Path, content: bytes) -> Header | FileFormatError:
    path.write_bytes(content)
    try:
        return read_header(path)
    except FileFormatError as error:
        return error


def safetensors_reads(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, KeyError):
        return False
    return True


def check_agreement(path: Path, content: bytes) -> None:
    """Refuse at least what safetensors refuses; what is read is consistent."""
    result = attempt(path, content)
    if isinstance(result, FileFormatError):
        sentence = str(result)
        assert sentence.startswith(f"{path}: expected ") and ", found " in sentence
        assert "\n" not in sentence and len(sentence) < 1000
        return
    assert safetensors_reads(path)
    end = result.data_start
    for key, extent in result.extents.items():
        assert extent.offset == end and extent.length == result.specs[key].nbytes
        end += extent.length
    assert end == result.size == len(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.integers(-2, 40) | st.just(2**63) | st.just(2**64) | JSON
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F13", "f32"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, max_size=3) | JSON,
    },
)
HEADERS = st.dictionaries(NAMES | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


@settings(max_examples=200, deadline=None)
@given(table=HEADERS, size=st.integers(0, 40))
def test_a_made_up_header_is_refused_in_a_sentence_or_consistent(folder, table, size):
    text = json.dumps(table).encode()
    check_agreement(folder / "x", struct.pack("<Q", len(text)) + text + bytes(size))


@settings(max_examples=100, deadline=None)
@given(specs=LAYOUTS.filter(bool), data=st.data())
def test_a_valid_header_with_one_number_changed_is_refused_or_consistent(folder, specs, data):
    content = format_header(specs, {})
    table = json.loads(content[8:])
    entry = table[data.draw(st.sampled_from(sorted(table)))]
    field = data.draw(st.sampled_from(["shape", "data_offsets"]))
    if not entry[field]:
        return
    place = data.draw(st.integers(0, len(entry[field]) - 1))
    entry[field][place] = data.draw(NUMBERS)
    text = json.dumps(table).encode()
    room = sum(spec.nbytes for spec in specs.values())
    check_agreement(folder / "x", struct.pack("<Q", len(text)) + text + bytes(room))


@settings(max_examples=150, deadline=None)
@given(specs=LAYOUTS, data=st.data())
def test_a_file_with_bytes_changed_cut_or_added_is_refused_or_consistent(folder, specs, data):
    content = bytearray(format_header(specs, {"a": "b"}))
    content += bytes(sum(spec.nbytes for spec in specs.values()))
    change = data.draw(st.sampled_from(["byte", "cut", "add"]))
    if change == "byte":
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif change == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += data.draw(st.binary(min_size=1, max_size=9))
    check_agreement(folder / "x", bytes(content))
    if change != "byte":
        assert isinstance(attempt(folder / "x", bytes(content)), FileFormatError)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=80))
def test_random_bytes_are_refused_or_consistent_by_every_door(folder, content):
    check_agreement(folder / "x", content)
    try:
        open_source(folder / "x")
    except FileFormatError as error:
        assert str(error).startswith(str(folder / "x"))


@settings(max_examples=60, deadline=None)
@given(specs=LAYOUTS)
def test_a_layout_is_aligned_and_complete(specs):
    order = layout(specs)
    assert sorted(order) == sorted(specs)
    position = 0
    for key in order:
        spec = specs[key]
        assert not spec.nbytes or position % (DTYPE_BITS[spec.dtype] // 8) == 0
        assert spec.nbytes == math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8
        position += spec.nbytes
