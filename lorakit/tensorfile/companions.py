"""What belongs to a model beside its weights: configurations, tokenizers, licences."""

import os
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import FileFormatError
from lorakit.tensorfile.multifile import MultiFileSource
from lorakit.tensorfile.reading import reading

# Weights in other formats or variants would no longer be those of the model beside them.
_OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".ckpt",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".pb",
    ".h5",
    ".msgpack",
    ".tflite",
)


def companions(root: MultiFileSource) -> dict[str, Path]:
    """Return the files to copy along with a model: relative path, with forward slashes -> file.

    Raises:
        FileFormatError: a link leads out of the model's folder, or a file cannot be looked at.
    """
    found = {}
    with reading(root.root):
        for file in _files(root.root, _homes(root.root)):
            name = file.relative_to(root.root).as_posix()
            index = ".index." in file.name and name not in root.indexes
            if not (file.suffix.lower() in _OTHER_WEIGHTS or index):
                found[name] = file
    return dict(sorted(found.items()))


def _homes(folder: Path) -> tuple[Path, ...]:
    """Return where links may lead: into the folder, and from a snapshot of Hugging Face's cache."""
    real = folder.resolve()
    snapshot = real.parent.name == "snapshots"
    return (real, real.parent.parent / "blobs") if snapshot else (real,)


def _files(folder: Path, homes: tuple[Path, ...]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            _check_link(entry, homes)
        if entry.is_dir():
            yield from _files(entry, homes)
        elif entry.is_file():
            yield entry


def _check_link(link: Path, homes: tuple[Path, ...]) -> None:
    """Refuse a link that would copy what is not the model's, or lead in a circle."""
    target = Path(os.path.realpath(link))
    inside = any(home == target or home in target.parents for home in homes)
    if not inside or target in link.absolute().parents or target == homes[0]:
        raise FileFormatError(
            f"{link}: expected a file of the model's own, found a link that leads to {target}; put "
            "a copy there."
        )
