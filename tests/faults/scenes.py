"""Commands that write, each over an old output, and what their outputs hold."""

from collections.abc import Mapping
from pathlib import Path

SCENES: Mapping[str, tuple[str, ...]] = {
    "merge": ("merge", "a.safetensors", "b.safetensors:-0.4", "-o", "out.safetensors"),
    "bake": ("merge", "a.safetensors", "--into", "base.safetensors", "-o", "out.safetensors"),
    "PEFT folder": ("convert", "a.safetensors", "--to", "peft", "-o", "out"),
    "diffusers folder": ("merge", "a.safetensors", "--into", "pipeline", "-o", "out"),
    "metadata": ("metadata", "set", "out.safetensors", "x=new", "--in-place"),
}
PAST_THE_CACHE = "bake past the page cache"
VERIFIED = "bake and verify"
FOLDERS = ("PEFT folder", "diffusers folder")
FILES = ("merge", "bake", "metadata", PAST_THE_CACHE, VERIFIED)


def arguments_of(scene: str) -> list[str]:
    """Return the command line of a scene; the old output may be replaced."""
    plain = {PAST_THE_CACHE: "bake", VERIFIED: "bake"}.get(scene, scene)
    more = [] if scene == "metadata" else ["--overwrite"]
    return [*SCENES[plain], *more, *(["--verify"] if scene == VERIFIED else [])]


def output_of(folder: Path, scene: str) -> Path:
    """Return where a scene's output is."""
    return folder / ("out" if scene in FOLDERS else "out.safetensors")


def content(place: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of every file of a folder."""
    if place.is_file():
        return {"": place.read_bytes()}
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return {file.relative_to(place).as_posix(): file.read_bytes() for file in files}


def others(folder: Path) -> list[str]:
    """Return the names in a scene's folder that are neither inputs nor outputs."""
    known = ("a.safetensors", "b.safetensors", "base.safetensors", "pipeline", "out")
    return sorted(e.name for e in folder.iterdir() if e.name not in (*known, "out.safetensors"))
