"""--verify: what is not what it should be never takes its place."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import saving
from lorakit.models import Rounded
from lorakit.tensorfile import relabel, writer
from lorakit.tensorfile.header import read_header
from tests.helpers import ran, refused

LORAS: dict[str, tuple[str, ...]] = {
    "merge": ("merge", "a.safetensors:0.7", "b.safetensors:-0.4"),
    "merge of a rank": ("merge", "a.safetensors", "b.safetensors", "--rank", "2"),
    "merge by a method": ("merge", "a.safetensors", "b.safetensors", "--method", "ties"),
    "extract": ("extract", "base.safetensors", "tuned.safetensors", "--rank", "2"),
    "extract of LoRAs": ("extract", "a.safetensors", "b.safetensors"),
    "extract whole": ("extract", "base.safetensors", "tuned.safetensors", "--as", "full"),
    "resize": ("resize", "a.safetensors", "--rank", "1"),
    "cut-blocks": ("cut-blocks", "a.safetensors", "--preset", "ALL0.5"),
    "cut-blocks of a DoRA": ("cut-blocks", "dora.safetensors", "--keep", "OUT03"),
    "convert": ("convert", "a.safetensors", "--to", "diffusers"),
    "convert to a folder": ("convert", "a.safetensors", "--to", "peft"),
}
MODELS: dict[str, tuple[str, ...]] = {
    "bake": ("merge", "a.safetensors", "--into", "base.safetensors"),
    "bake by a method": (
        *("merge", "a.safetensors", "b.safetensors", "--into", "base.safetensors"),
        *("--method", "ties"),
    ),
    "bake into a folder": ("merge", "a.safetensors", "--into", "pipeline"),
    "bake a model on paper": (
        *("merge", "a.safetensors", "--into", "base.safetensors+b.safetensors:0.5"),
    ),
}
COMMANDS = {**LORAS, **MODELS}
METADATA = ("metadata", "set", "a.safetensors", "note=mine")
DESTINATIONS = ("out", "out.safetensors")


def output_of(name: str) -> str:
    return "out" if "folder" in name else "out.safetensors"


def flip(file: Path, place: int) -> None:
    """Change the lowest bit of a byte."""
    with open(file, "r+b") as opened:
        opened.seek(place if place >= 0 else file.stat().st_size + place)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def in_a_tensor(file: Path) -> int:
    """Return a place in the middle of the largest tensor: where numbers have their low bits."""
    extents = read_header(file).extents
    largest = max(extents.values(), key=lambda extent: extent.length)
    return largest.offset + largest.length // 2 // 4 * 4


def in_the_metadata(file: Path) -> int:
    raw = file.read_bytes()
    return raw.index(b'":"', raw.index(b'"__metadata__":{')) + len('":"')


def in_the_last_byte(file: Path) -> int:
    return -1


PLACES: dict[str, Callable[[Path], int]] = {
    "a tensor": in_a_tensor,
    "the last byte": in_the_last_byte,
    "the metadata": in_the_metadata,
}


def there(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in DESTINATIONS)


EVERY = [(name, "a tensor") for name in COMMANDS]
SOME = [(name, place) for name in ("merge", "convert to a folder", "bake") for place in PLACES]


@pytest.mark.parametrize(("name", "place"), sorted({*EVERY, *SOME}))
def test_one_changed_bit_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    """The bit changes on disk, between the write and the look at it."""
    command, out = COMMANDS[name], Path(output_of(name))
    before = there(folder)
    changed = []

    def corrupt(file: Path, source: Any) -> None:
        if not changed:
            flip(file, PLACES[place](file))
        changed.append(file)
        check(file, source)

    check = writer.check_header
    monkeypatch.setattr(writer, "check_header", corrupt)
    if out.suffix:
        out.write_bytes(b"old")
    words = refused(*command, "-o", out, "--overwrite", "--verify")
    assert changed and str(out) in words and ".tmp" not in words
    assert out.read_bytes() == b"old" if out.suffix else not out.exists()
    assert there(folder) == before


@pytest.mark.parametrize("name", LORAS)
def test_a_wrong_number_is_found_by_computing_it_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The file holds just what was written, hashes and all; but what was written is wrong."""
    if "DoRA" in name:
        pytest.skip("without its base a DoRA's change is not known")
    command, out = LORAS[name], Path(output_of(name))
    made = saving.stored_tensors

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        tensors = made(*args, **kwargs)
        key = next(key for key in tensors if key.endswith(("up.weight", "B.weight", ".diff")))
        return {**tensors, key: tensors[key] * 1.01}

    monkeypatch.setattr(saving, "stored_tensors", wrong)
    words = refused(*command, "-o", out, "--verify")
    assert "differs from the exact result" in words and str(out) in words
    assert not out.exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_one_step_off_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    command, out = MODELS[name], Path(output_of(name))
    get = Rounded.get

    def wrong(self: Rounded, key: str) -> Tensor:
        value = get(self, key)
        if key not in self.applied.addends or value.ndim < 2:
            return value
        stored = value.half()
        return torch.nextafter(stored, torch.full_like(stored, torch.inf))

    monkeypatch.setattr(Rounded, "get", wrong)
    words = refused(*command, "-o", out, "--verify")
    assert "units in the last place" in words and str(out) in words
    assert not out.exists()


@pytest.mark.parametrize("kind", ["a copy", "a text"])
def test_what_lies_beside_the_weights_is_compared_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    check = writer.check_beside

    def corrupt(place: Path, texts: Any, copies: Any) -> None:
        flip(place / next(iter(copies if kind == "a copy" else texts)), 3)
        check(place, texts, copies)

    monkeypatch.setattr(writer, "check_beside", corrupt)
    command = MODELS["bake into a folder"] if kind == "a copy" else LORAS["convert to a folder"]
    words = refused(*command, "-o", "out", "--verify")
    assert "config.json" in words or "model_index.json" in words
    assert not Path("out").exists()


@pytest.mark.parametrize("place", PLACES)
def test_metadata_are_read_back(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    check = relabel._check_same

    def corrupt(file: Any, told: Any, written: Path, real: Path) -> None:
        flip(written, PLACES[place](written))
        check(file, told, written, real)

    out = Path("out.safetensors")
    assert ran(*METADATA, "-o", out, "--verify")["verified"] is True
    before = out.read_bytes()
    monkeypatch.setattr(relabel, "_check_same", corrupt)
    words = refused(*METADATA, "-o", out, "--overwrite", "--verify")
    assert str(out) in words and bool(out.read_bytes() == before)
    assert ran(*METADATA, "-o", out, "--overwrite")["verified"] is False


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_right_is_said_to_be(folder: Path, name: str) -> None:
    report = ran(*COMMANDS[name], "-o", output_of(name), "--verify")
    found = report["verified"]
    assert found["largest"] <= 1 and found["tolerance"] > 0
    assert found["layers"] > 0 or "DoRA" in name
