"""Small steps around recipes."""

import json
from pathlib import Path

from tests.helpers import metadata_of

FACE = "1,0,0,0,0,0,0,0.125,1e-3,1,1,0,0,0,0,0,-0.3"
"""A preset of the user's own, in `own.txt`."""
TWO = ("a.safetensors:0.7", "b.safetensors:-0.4")


def same(first: Path, second: Path) -> bool:
    """Tell whether two files, or all files of two folders, have the same bytes."""
    if first.is_dir():
        names = [file.relative_to(first) for file in sorted(first.rglob("*")) if file.is_file()]
        there = [file.relative_to(second) for file in sorted(second.rglob("*")) if file.is_file()]
        return names == there and all(same(first / name, second / name) for name in names)
    return first.read_bytes() == second.read_bytes()


def recipe_of(file: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(metadata_of(file)["lorakit.recipe"])
    return found
