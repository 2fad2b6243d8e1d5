"""An input that is cut off or changed while it is read is told, and no output is made of it."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from lorakit import models
from lorakit.lorafile import load_lora
from lorakit.tensorfile import relabel, sinks, whole
from lorakit.tensorfile.header import Extent
from tests.faults.scenes import PAST_THE_CACHE, content, output_of
from tests.helpers import refused, run, tensors_of

ROOT = Path(__file__).parents[2]
MakeScene = Callable[[str], Path]


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def grown(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(bytes(100))


def removed(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    os.truncate(file, 0)


CHANGES = (truncated, grown, removed, emptied)


def when_asked(
    number: int, source: type[Any], step: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Do something before a tensor is read from a source, the first, the second or so on.

    Returns:
        The keys that are asked for, as they are.
    """
    get, asked = source.get, list[str]()

    def meanwhile(self: object, key: str) -> torch.Tensor:
        asked.append(key)
        if len(asked) == number:
            step()
        tensor: torch.Tensor = get(self, key)
        return tensor

    monkeypatch.setattr(source, "get", meanwhile)
    return asked


def when_read(number: int, step: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something before a block of a LoRA is read, the first, the second or so on."""
    read, count = whole.read_exactly, itertools.count(1)

    def meanwhile(file: BinaryIO, path: Path, buffer: memoryview) -> None:
        if next(count) == number:
            step()
        read(file, path, buffer)

    monkeypatch.setattr(whole, "_BLOCK", 2**12)
    monkeypatch.setattr(whole, "read_exactly", meanwhile)


@pytest.mark.parametrize("scene", ["bake", PAST_THE_CACHE, "diffusers folder"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changes_while_it_is_baked(
    make_scene: MakeScene,
    monkeypatch: pytest.MonkeyPatch,
    scene: str,
    change: Callable[[Path], None],
) -> None:
    folder = make_scene(scene)
    monkeypatch.chdir(folder)
    if scene == PAST_THE_CACHE:
        monkeypatch.setattr(sinks, "LEAST", 0)
    model = "pipeline" if "folder" in scene else "base.safetensors"
    files = sorted((folder / "pipeline").rglob("*.safetensors")) if "folder" in scene else None
    victim = files[-1] if files else folder / "base.safetensors"
    old = content(output_of(folder, scene))
    asked = when_asked(3, models.Rounded, lambda: change(victim), monkeypatch)
    out = output_of(folder, scene).name
    words = refused("merge", "a.safetensors", "--into", model, "-o", out, "--overwrite",
                    "--threads", 1)  # fmt: skip
    why = "nothing there" if change is removed else "changed"
    assert len(asked) >= 3 and victim.name in words and why in words
    assert bool(content(output_of(folder, scene)) == old)
    assert not list(folder.glob(".out*"))


@pytest.mark.parametrize(
    ("change", "shared"),
    [(change, shared) for change in CHANGES for shared in (False, True) if change is not emptied]
    + [(emptied, False)],
)
def test_a_lora_that_changes_while_it_is_loaded(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    shared: bool,
) -> None:
    monkeypatch.setattr(whole, "_MAPS", shared)
    file = tmp_path / "mine.safetensors"
    file.write_bytes((made / "a.safetensors").read_bytes())
    when_read(3, lambda: change(file), monkeypatch)
    words = refused("merge", file, "-o", tmp_path / "out.safetensors")
    assert "mine.safetensors" in words
    assert [entry.name for entry in tmp_path.iterdir()] in ([], ["mine.safetensors"])


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no pages are shared")
def test_a_lora_that_is_emptied_in_place_while_it_is_used_ends_the_command(
    made: Path, tmp_path: Path
) -> None:
    """Its pages are gone with its bytes; the old output stays, as after any other end."""
    file, out = tmp_path / "mine.safetensors", tmp_path / "out.safetensors"
    file.write_bytes((made / "a.safetensors").read_bytes())
    out.write_bytes(b"old")
    code = (
        "import os, sys\n"
        "from lorakit.cli import lorakit\n"
        "from lorakit.operations import merge\n"
        "plain = merge.from_pieces\n"
        "def emptied(*args, **more):\n"
        "    os.truncate(sys.argv[1], 0)\n"
        "    return plain(*args, **more)\n"
        "merge.from_pieces = emptied\n"
        "lorakit(['merge', sys.argv[1], '-o', sys.argv[2], '--rank', '2', '--overwrite'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, file, out],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert not done.stdout
    assert out.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [file.name, out.name]


def test_a_lora_that_another_takes_the_place_of_is_read_as_one_or_the_other(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, so that no size tells it."""
    file = tmp_path / "mine.safetensors"
    first = tensors_of(made / "a.safetensors")
    save_file(first, file)
    other = {key: tensor + 1 if tensor.ndim else tensor for key, tensor in first.items()}

    def replace() -> None:
        save_file(other, tmp_path / "new")
        (tmp_path / "new").replace(file)

    when_read(3, replace, monkeypatch)
    words = refused("merge", file, "-o", tmp_path / "out.safetensors")
    assert "mine.safetensors" in words and "changed" in words


def test_metadata_of_a_file_that_another_takes_the_place_of(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((made / "a.safetensors").read_bytes())
    copy = relabel.copy_extent

    def meanwhile(extent: Extent, target: BinaryIO) -> Iterator[int]:
        (tmp_path / "new").write_bytes((made / "b.safetensors").read_bytes())
        (tmp_path / "new").replace(file)
        return copy(extent, target)

    monkeypatch.setattr(relabel, "copy_extent", meanwhile)
    words = refused("metadata", "set", file, "x=1", "--in-place")
    assert "mine.safetensors" in words
    assert bool(file.read_bytes() == (made / "b.safetensors").read_bytes())
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.safetensors"]


def test_what_does_not_change_is_read(made: Path) -> None:
    assert run("inspect", made / "a.safetensors").exit_code == 0
    assert load_lora(made / "a.safetensors").adapters
