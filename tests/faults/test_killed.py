"""Killed at any step of a write, the old output is intact or the new one is whole."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.scenes import FILES, FOLDERS, arguments_of, content, others, output_of
from tests.faults.steps import DATA
from tests.helpers import run

ROOT = Path(__file__).parents[2]
TEMPORARY = re.compile(r"\.out(\.safetensors)?\.[0-9a-f]{8}\.tmp")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork of POSIX")


def killed(folders: dict[str, Path]) -> dict[str, list[dict[str, str]]]:
    """Kill scenes at their steps; the last run of each is a whole one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killer"],
        input=json.dumps({scene: str(folder) for scene, folder in folders.items()}),
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("scenes", [FILES, FOLDERS], ids=["files", "folders"])
def test_the_old_output_is_intact_or_the_new_one_whole(make_scene, scenes) -> None:  # type: ignore[no-untyped-def]
    folders = {scene: make_scene(scene) for scene in scenes}
    for scene, (*runs, whole) in killed(folders).items():
        old = content(output_of(folders[scene], scene))
        new = content(output_of(Path(whole["folder"]), scene))
        assert bool(old != new) and not others(Path(whole["folder"]))
        states = [_is_new(Path(one["folder"]), scene, old, new) for one in runs]
        assert states == sorted(states) and not states[0], (scene, runs)
        # The kills came at every stage, up to the step that counts and after it.
        steps = {one["step"] for one in runs}
        assert {"open", "fsync", "swap" if scene in FOLDERS else "replace"} <= steps
        assert steps & set(DATA)
        left = [place for one in runs if others(place := Path(one["folder"]))]
        _starts_afresh(left[len(left) // 2], scene, new)


def _is_new(place: Path, scene: str, old: dict[str, bytes], new: dict[str, bytes]) -> bool:
    found = content(output_of(place, scene))
    assert found in (old, new), place
    assert all(TEMPORARY.fullmatch(name) for name in others(place)), place
    return bool(found == new)


def _starts_afresh(place: Path, scene: str, new: dict[str, bytes]) -> None:
    """Run the command again: what the killed one left is gone, once it is not quite new."""
    for name in others(place):
        os.utime(place / name, (time.time() - 100,) * 2)
    before = Path.cwd()
    os.chdir(place)
    try:
        result = run(*arguments_of(scene))
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    assert content(output_of(place, scene)) == new
    assert not others(place)
