"""edit_metadata: a file with other metadata before the same bytes of tensors; without torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError, SpecError
from lorakit.progress import Progress, silent
from lorakit.report import SCHEMA, name_some
from lorakit.tensorfile.hashes import HASHES
from lorakit.tensorfile.relabel import (
    Hash,
    check_hashes,
    open_stored,
    rewritten,
    with_hashes,
)
from lorakit.tensorfile.replacing import check_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """What was changed, and what was written.

    Args:
        command: "metadata set", "metadata remove" or "metadata hash".
        file: what was edited.
        before: all of its metadata.
        set: key -> new value, of what is not as it was.
        removed: keys that are gone.
        output: what was written, the file itself where it was edited in place.
        output_bytes: its size.
        verified: whether it was read back before it took its place.
    """

    command: str
    file: str
    before: Mapping[str, str]
    set: Mapping[str, str]
    removed: tuple[str, ...]
    output: str
    output_bytes: int
    verified: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `schema` tells the layout's version."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "file": self.file,
            "set": dict(self.set),
            "removed": list(self.removed),
            "output": self.output,
            "output_bytes": self.output_bytes,
            "verified": self.verified,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """The hashes of a file: what is stored, and what its bytes have."""

    file: str
    hashes: tuple[Hash, ...]

    @property
    def right(self) -> bool:
        """Whether no stored hash is wrong."""
        return all(one.right is not False for one in self.hashes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `schema` tells the layout's version."""
        hashes = [
            {"key": one.key, "stored": one.stored, "found": one.found, "verdict": one.verdict}
            for one in self.hashes
        ]
        return {
            "schema": SCHEMA,
            "command": "metadata hash",
            "file": self.file,
            "hashes": hashes,
        }


def read_metadata(path: str | Path) -> Mapping[str, str]:
    """Return what a safetensors file says of itself, from its header.

    Args:
        path: the file.

    Raises:
        FileFormatError: it is no safetensors file.
    """
    return open_stored(Path(path)).header.metadata


def edit_metadata(
    path: str | Path,
    *,
    values: Mapping[str, str] | None = None,
    remove: Sequence[str] = (),
    hashes: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress = silent,
) -> Edited:
    """Write a file with other metadata; the tensors' bytes are copied as they are, in their order.

    Hashes that are there stay true.

    Args:
        path: a safetensors file.
        values: keys to set.
        remove: keys to remove first; `ss_*` takes all that begin so.
        hashes: write the hashes too, also those that are not there.
        output: another file; None replaces the file itself, at once when all is written.
        overwrite: replace an existing output.
        verify: read the output back before it takes its place.
        progress: called with (what, done, total).

    Raises:
        SpecError: a key to remove is not there, or a hash is to be set.
        OutputError: the output exists or is the file, or cannot be written.
        FileFormatError: the file cannot be read whole.
    """
    stored, changes = open_stored(Path(path)), dict(values or {})
    for key in changes:
        if key in HASHES:
            raise SpecError(f"{key} is computed, not set; see lorakit metadata hash --in-place.")
    old = stored.header.metadata
    told = _without(old, remove, stored.path) | changes
    place = _place(stored.path, output, overwrite=overwrite)
    nbytes, new = rewritten(
        stored,
        with_hashes(stored, told) if hashes else told,
        place=place,
        verify=verify,
        progress=progress,
    )
    what = "hash" if hashes else "remove" if remove and not changes else "set"
    return Edited(
        command=f"metadata {what}",
        file=str(path),
        before=dict(old),
        set={key: new[key] for key in sorted(new) if old.get(key) != new[key]},
        removed=tuple(sorted(key for key in old if key not in new)),
        output=str(path if output is None else output),
        output_bytes=nbytes,
        verified=verify,
    )


def metadata_hashes(path: str | Path) -> Hashed:
    """Compute the hashes of a file, and compare those that it stores.

    Args:
        path: a safetensors file.

    Raises:
        FileFormatError: it is no safetensors file, or cannot be read whole.

    Cost: one pass over the data.
    """
    return Hashed(file=str(path), hashes=check_hashes(open_stored(Path(path))))


def _without(told: Mapping[str, str], patterns: Sequence[str], path: Path) -> dict[str, str]:
    missing = [p for p in patterns if not any(fnmatchcase(key, p) for key in told)]
    if missing:
        there = name_some(sorted(told)) or "none"
        raise SpecError(f"{path}: expected a key '{missing[0]}' to remove, found {there}.")
    return {
        key: text for key, text in told.items() if not any(fnmatchcase(key, p) for p in patterns)
    }


def _place(path: Path, output: str | Path | None, *, overwrite: bool) -> Path:
    if output is not None:
        return check_file(Path(output), overwrite=overwrite, inputs=[path])
    place = path.resolve()
    if not os.access(place, os.W_OK):
        raise OutputError(
            f"{path}: expected a file that may be changed, found one that is read-only; make it "
            "writable, or write another one with -o."
        )
    return place
