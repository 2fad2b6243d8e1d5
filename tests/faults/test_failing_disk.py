"""A disk that is full, failing or closed: one sentence, status 1, the old output as it was."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorakit.tensorfile import leftovers, replacing, sinks, swapping
from lorakit.tensorfile.replacing import replaced_file, replaced_folder
from tests.faults.scenes import (
    FOLDERS,
    PAST_THE_CACHE,
    VERIFIED,
    arguments_of,
    content,
    others,
    output_of,
)
from tests.faults.steps import DATA, stages, watched
from tests.helpers import refused, run

MakeScene = Callable[[str], Path]
REMOVES = ("unlink", "rmdir")
HARMLESS = ("mkdir", "copy_file_range", "fsync", *REMOVES)
"""A folder that is there is not made; where the kernel copies no more, plain reading and writing
goes on; the others come after the rename, too late to do harm."""


def broken_at(stage: int | None, error: BaseException, steps: list[str]) -> Callable[[str], None]:
    def act(name: str) -> None:
        steps.append(name)
        if len(steps) - 1 == stage:
            raise error

    return act


def recorded(scene: str) -> list[str]:
    steps: list[str] = []
    with watched(steps.append):
        assert run(*arguments_of(scene)).exit_code == 0
    return steps


@pytest.mark.parametrize("scene", ["bake", "metadata", PAST_THE_CACHE, VERIFIED, *FOLDERS])
def test_full_at_any_step(
    make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch, scene: str
) -> None:
    """The disk is full once; what is removed or synced after the new output is there may fail."""
    folder = make_scene(scene)
    monkeypatch.chdir(folder)
    if scene == PAST_THE_CACHE:
        monkeypatch.setattr(sinks, "LEAST", 0)
        monkeypatch.setattr(sinks, "BUFFER", 2**16)
    spare = folder.with_name("spare")
    shutil.copytree(folder, spare)
    old = content(output_of(folder, scene))
    steps = recorded(scene)
    new = content(output_of(folder, scene))
    seen = set()
    for stage in stages(steps):
        shutil.rmtree(folder)
        shutil.copytree(spare, folder)
        os.chdir(folder)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        again: list[str] = []
        with watched(broken_at(stage, full, again)):
            result = run(*arguments_of(scene))
        assert again[: stage + 1] == steps[: stage + 1]
        found = content(output_of(folder, scene))
        assert found in (old, new), steps[stage]
        seen.add((steps[stage], result.exit_code))
        if result.exit_code:
            (sentence,) = result.output.splitlines()
            assert bool(found == old) and "free some space" in sentence and "out" in sentence
        else:
            assert bool(found == new) and steps[stage] in HARMLESS
        assert not others(folder) or steps[stage] in REMOVES
    assert {("open", 1), ("fsync", 1), ("fsync", 0)} <= seen
    assert ("swap" if scene in FOLDERS else "replace", 1) in seen
    assert {name for name, status in seen if status} & set(DATA)


@pytest.mark.parametrize("failing", ["rename", "swap"])
def test_a_folder_comes_back_where_two_names_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """As on Windows: two renames; if the second fails the first is undone."""
    monkeypatch.setattr(swapping, "_call", lambda: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    renames: list[str] = []

    def act(name: str) -> None:
        renames.append(name)
        if failing == "rename" and renames.count("rename") == 2 and name == "rename":
            raise PermissionError(errno.EACCES, "in use")

    def replace() -> None:
        with watched(act), replaced_folder(out) as folder:
            (folder / "x").write_text("new")

    if failing == "rename":
        with pytest.raises(Exception, match="close programs"):
            replace()
    else:
        replace()
    assert (out / "x").read_text() == ("old" if failing == "rename" else "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert renames.count("rename") >= 2


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_file_that_a_scanner_holds_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Windows renames no file that is open, and scanners open each new one."""
    monkeypatch.setattr(replacing, "_WAITS", (0.0, 0.0))
    out, failed = tmp_path / "out", []

    def act(name: str) -> None:
        if name == "replace" and len(failed) < times:
            failed.append(name)
            raise PermissionError(errno.EACCES, "in use")

    def replace() -> None:
        with watched(act), replaced_file(out) as file:
            file.write(b"new")

    if times > 2:
        with pytest.raises(Exception, match="close programs"):
            replace()
    else:
        replace()
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if times < 3 else [])


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB where this user may."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("told", [True, False], ids=["told beforehand", "full in the middle"])
def test_a_real_file_system_that_is_full(
    made: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    out = tiny / "out.safetensors"
    out.write_bytes(b"old")
    if not told:
        plenty = shutil.disk_usage(tiny)._replace(free=2**40)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: plenty)
    command = ["merge", made / "a.safetensors", "--into", made / "base.safetensors", "-o", out]
    sentence = refused(*command, "--overwrite")
    assert ("free bytes" if told else "No space left on device") in sentence
    assert out.read_bytes() == b"old"
    assert [entry.name for entry in tiny.iterdir()] == ["out.safetensors"]


def test_what_a_killed_run_left_makes_room(made: Path, tiny: Path) -> None:
    out = tiny / "out.safetensors"
    left = leftovers.sibling(out)
    left.write_bytes(bytes(1_040_000))
    command = ["merge", made / "a.safetensors", "-o", out, "--rank", 1]
    assert "free bytes" in refused(*command)
    os.utime(left, (time.time() - 100,) * 2)
    assert run(*command).exit_code == 0
    assert [entry.name for entry in tiny.iterdir()] == ["out.safetensors"]


def test_leftovers_of_others_and_of_the_living_stay(tmp_path: Path) -> None:
    """Only what was made for the same output, is not held, and is no link is removed."""
    out = tmp_path / "out.safetensors"
    names = {
        "live": leftovers.sibling(out),
        "young": leftovers.sibling(out),
        "dead": leftovers.sibling(out),
        "another's": leftovers.sibling(tmp_path / "outer.safetensors"),
        "like it": tmp_path / ".out.safetensors.01234567.tmp.txt",
        "the user's": tmp_path / ".out.safetensors.backup.tmp",
    }
    for place in names.values():
        place.write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    if os.name == "posix":
        names["link"] = leftovers.sibling(out)
        names["link"].symlink_to(tmp_path / "elsewhere")
    old = (time.time() - 100,) * 2
    for name, place in names.items():
        if name != "young":
            os.utime(place, old)
    with leftovers.held(names["live"]), open(names["live"], "ab"):
        leftovers.remove_leftovers(out)
    there = {name for name, place in names.items() if os.path.lexists(place)}
    assert there == names.keys() - {"dead"}


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_folder_that_a_killed_run_left_is_removed_and_a_live_one_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folders = [leftovers.sibling(out) for _ in range(2)]
    for folder in folders:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "x").write_text("x")
        os.utime(folder, (time.time() - 100,) * 2)
    with leftovers.held(folders[0]):
        leftovers.remove_leftovers(out)
        assert [folder.exists() for folder in folders] == [True, False]
    leftovers.remove_leftovers(out)
    assert not folders[0].exists()


def test_a_folder_that_nobody_may_write_to(made: Path, tmp_path: Path) -> None:
    """Root may write anywhere, but not into a file system that is mounted to be read."""
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "old").write_text("old")
    bound = _read_only(locked)
    try:
        sentence = refused("merge", made / "a.safetensors", "-o", locked / "out.safetensors")
        assert "out.safetensors" in sentence and "choose a" in sentence
        assert [entry.name for entry in locked.iterdir()] == ["old"]
    finally:
        if bound:
            subprocess.run(["umount", str(locked)], check=True)
        locked.chmod(0o700)


def _read_only(folder: Path) -> bool:
    if os.name != "posix":
        pytest.skip("modes of POSIX")
    if os.geteuid():
        folder.chmod(0o500)
        return False
    mounts = (["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)])
    for more in mounts:
        if subprocess.run(["mount", *more], capture_output=True).returncode:
            pytest.skip("root may write anywhere, and may not mount here")
    return True


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("odd")])
def test_whatever_is_raised_while_a_file_is_open(tmp_path: Path, error: BaseException) -> None:
    for replaced in (replaced_file, replaced_folder):
        with pytest.raises(type(error)), replaced(tmp_path / "out"):
            raise error
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_told_full_is_measured_where_the_output_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not there yet is on the disk of the nearest one that is."""
    asked: list[Path] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    place = tmp_path / "a" / "b" / "out"
    replacing.check_space(place, place, 1)
    assert asked == [tmp_path]
