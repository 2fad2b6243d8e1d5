"""Run scenes again and again, killed at another step each time: `python -m tests.faults.killer`.

Standard input names scenes and their folders as JSON. Each run gets a copy of its folder and a
process of its own, which shares what was imported. Standard output tells, for every run of a scene,
its copy and the step at which it was killed; the last run is a whole one.
"""

import json
import os
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

from lorakit.cli import lorakit
from lorakit.tensorfile import sinks
from tests.faults.scenes import PAST_THE_CACHE, arguments_of
from tests.faults.steps import stages, watched


def main() -> None:
    # What a command imports while it runs is loaded once, here.
    for name in ("apply", "convert", "merge", "verify", "verify_model"):
        import_module(f"lorakit.operations.{name}")
    import_module("lorakit.saving")
    scenes = json.load(sys.stdin).items()
    json.dump({scene: killed(Path(folder), scene) for scene, folder in scenes}, sys.stdout)


def killed(folder: Path, scene: str) -> list[dict[str, str]]:
    whole = copied(folder, "all")
    steps = recorded(whole, scene)
    runs = []
    for stage in stages(steps):
        place = copied(folder, str(stage))
        assert in_child(place, scene, stage) == -signal.SIGKILL, (scene, steps[stage])
        runs.append({"folder": str(place), "step": steps[stage]})
    return [*runs, {"folder": str(whole), "step": ""}]


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-{name}"), symlinks=True))


def recorded(place: Path, scene: str) -> list[str]:
    """Run a scene to its end, in a process of its own, and return its steps."""
    log = place.with_name(f"{place.name}.steps")
    assert in_child(place, scene, None, log) == 0, place
    return log.read_text().split()


def in_child(place: Path, scene: str, stage: int | None, log: Path | None = None) -> int:
    """Run a scene in a child that is killed at a stage; return 0, or minus the signal."""
    child = os.fork()
    if not child:
        run(place, scene, stage, log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(place: Path, scene: str, stage: int | None, log: Path | None) -> None:
    steps: list[str] = []

    def act(name: str) -> None:
        if len(steps) == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(name)

    os.chdir(place)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if scene == PAST_THE_CACHE:
        sinks.LEAST, sinks.BUFFER = 0, 2**16
    with watched(act):
        lorakit.main(arguments_of(scene), standalone_mode=False)
    if log is not None:
        log.write_text("\n".join(steps))
    os._exit(0)


if __name__ == "__main__":
    main()
