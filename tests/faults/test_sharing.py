"""Two processes that write one output: it is always that of one of them, and whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit.errors import OutputError
from lorakit.tensorfile.replacing import replaced_file, replaced_folder
from lorakit.tensorfile.source import DictSource, open_source
from lorakit.tensorfile.writer import write_folder, write_safetensors

ROOT = Path(__file__).parents[2]
WRITER = """
import hashlib, json, sys, torch
from lorakit.tensorfile.source import DictSource
from lorakit.tensorfile.writer import write_safetensors
from pathlib import Path
number, out = int(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(60):
    value = torch.full((70_000,), float(number * 1000 + turn))
    write_safetensors(out, DictSource({"x": value}), overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="on Windows an open file cannot be replaced")
def test_a_reader_sees_one_whole_file_or_the_other(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write_safetensors(out, DictSource({"x": torch.zeros(70_000)}))
    command = [sys.executable, "-c", WRITER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([*command, str(number), str(out)], env=environment, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for number in (1, 2)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        raw = out.read_bytes()
        value = torch.frombuffer(bytearray(raw[-280_000:]), dtype=torch.float32)
        assert len(raw) == 280_000 + 8 + int.from_bytes(raw[:8], "little")
        assert bool((value == value[0]).all())
        seen.add(int(value[0]) // 1000)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert {1, 2} <= seen
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"]


def test_the_last_that_ends_wins_where_both_may_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced_file(out) as first:
        first.write(b"first")
        with replaced_file(out) as second:
            second.write(b"second")
        assert out.read_bytes() == b"second"
    assert out.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_folders_take_each_others_place_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced_folder(out) as first:
        (first / "x").write_text("first")
        with replaced_folder(out) as second:
            (second / "x").write_text("second")
            (second / "y").write_text("second")
    assert {entry.name: entry.read_text() for entry in out.iterdir()} == {"x": "first"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_second_is_refused_where_it_may_not_overwrite(tmp_path: Path, kind: str) -> None:
    """The output came into being while the second one computed."""
    out = tmp_path / "out"
    one, two = DictSource({"x": torch.ones(3)}), DictSource({"x": torch.zeros(3)})

    def write(source: DictSource, then: object = None) -> None:
        def told(what: str, done: int, total: int) -> None:
            if then is not None and done == total:
                then()  # type: ignore[operator]

        if kind == "file":
            write_safetensors(out, source, progress=told)
        else:
            write_folder(out, {"x.safetensors": source}, progress=told)

    with pytest.raises(OutputError, match="--overwrite"):
        write(two, then=lambda: write(one))
    place = out if kind == "file" else out / "x.safetensors"
    assert torch.equal(open_source(place).get("x"), torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_file_that_someone_puts_into_the_folder_meanwhile_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = DictSource({"x": torch.ones(3)})
    write_folder(out, {"x.safetensors": source})

    def diary(what: str, done: int, total: int) -> None:
        (out / "diary.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"diary\.txt"):
        write_folder(out, {"x.safetensors": source}, overwrite=True, progress=diary)
    assert (out / "diary.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
