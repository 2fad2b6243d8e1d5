"""Windows and macOS, as far as Linux can play them: calls that lack, files that may not be open."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.tensorfile import leftovers, sinks, swapping, whole
from tests.faults.scenes import FOLDERS, SCENES, VERIFIED, arguments_of, content, others, output_of
from tests.helpers import mappings, needs_maps, run, tensors_of

MakeScene = Callable[[str], Path]
LACKING = (
    *("copy_file_range", "splice", "pwrite", "pread", "preadv", "pwritev"),
    *("posix_fadvise", "posix_fallocate", "O_DIRECT", "O_DIRECTORY", "O_TMPFILE", "O_NOFOLLOW"),
    *("fdatasync", "sync", "fchmod", "fchown", "chown", "mkfifo", "getuid", "geteuid", "fork"),
)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what Windows lacks: calls, locks, folders that can be opened, names that swap."""
    for name in LACKING:
        monkeypatch.delattr(os, name, raising=False)
    opened = os.open

    def open_file(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", open_file)
    # It opens folders where it may.
    monkeypatch.setattr(shutil, "_use_fd_functions", False, raising=False)
    monkeypatch.setattr(swapping, "_call", lambda: None)
    monkeypatch.setattr(leftovers, "_locked", lambda entry: None)
    monkeypatch.setattr(sinks, "LEAST", 2**16)
    monkeypatch.setattr(whole, "_MAPS", False)


@pytest.mark.parametrize("scene", [*SCENES, VERIFIED])
def test_the_bytes_are_the_same_without_the_calls_of_linux(
    make_scene: MakeScene,
    scene: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder = make_scene(scene)
    monkeypatch.chdir(folder)
    assert run(*arguments_of(scene)).exit_code == 0
    expected = content(output_of(folder, scene))
    request.getfixturevalue("bare")
    result = run(*arguments_of(scene))
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert bool(content(output_of(folder, scene)) == expected)
    assert others(folder) == []


def is_open(path: Path) -> bool:
    """Tell whether this process has a file, or one in a folder, open or mapped."""
    names = [line.partition("/")[2] for line in mappings()]
    held = {f"/{name}" for name in names if name}
    for entry in Path("/proc/self/fd").iterdir():
        # The one that lists them is closed by now.
        with suppress(OSError):
            held.add(str(entry.readlink()))
    real = os.path.realpath(path)
    return any(name == real or name.startswith(f"{real}/") for name in held)


@pytest.fixture
def strict(bare: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let no file be renamed, replaced or removed that is open; return what was done so."""
    done: list[str] = []

    def watch(name: str) -> None:
        plain = getattr(os, name)

        def act(*paths: object, **more: object) -> None:
            done.append(name)
            given = [Path(str(path)) for path in paths[:2] if not more]
            if any(is_open(path) for path in given):
                raise PermissionError(13, "in use", str(paths[-1]))
            plain(*paths, **more)

        monkeypatch.setattr(os, name, act)

    for name in ("replace", "rename", "unlink", "remove"):
        watch(name)
    return done


@needs_maps
@pytest.mark.parametrize("scene", [*SCENES, VERIFIED])
def test_nothing_is_open_when_the_output_takes_its_place(
    make_scene: MakeScene, scene: str, monkeypatch: pytest.MonkeyPatch, strict: list[str]
) -> None:
    folder = make_scene(scene)
    monkeypatch.chdir(folder)
    before = content(output_of(folder, scene))
    result = run(*arguments_of(scene))
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert bool(content(output_of(folder, scene)) != before)
    assert ("rename" if scene in FOLDERS else "replace") in strict
    assert others(folder) == []


@needs_maps
def test_a_file_that_is_open_is_told_and_stays(
    make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch, strict: list[str]
) -> None:
    """The control: another program reads the old output."""
    folder = make_scene("merge")
    monkeypatch.chdir(folder)
    before = content(output_of(folder, "merge"))
    with open("out.safetensors", "rb"):
        result = run(*arguments_of("merge"))
    assert result.exit_code == 1 and "close programs that use the file" in result.output
    assert bool(content(output_of(folder, "merge")) == before) and others(folder) == []


@needs_maps
def test_a_pickled_model_is_closed_when_it_was_read(
    make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch, strict: list[str]
) -> None:
    """torch maps it, and what is mapped can be neither moved nor removed on Windows."""
    folder = make_scene("bake")
    monkeypatch.chdir(folder)
    torch.save(tensors_of(Path("base.safetensors")), "base.ckpt")
    command = ["merge", "a.safetensors", "--into", "base.ckpt", "-o", "out.safetensors"]
    assert run(*command, "--overwrite", "--verify").exit_code == 0
    assert others(folder) == ["base.ckpt"] and not is_open(Path("base.ckpt"))
    source = lorakit.open_source("base.ckpt")
    assert source.specs and is_open(Path("base.ckpt")), "the control"
