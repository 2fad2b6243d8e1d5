"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lorakit.errors import OutputError
from lorakit.tensorfile.filenames import no_file_on_windows
from lorakit.tensorfile.leftovers import held, remove_leftovers, sibling
from lorakit.tensorfile.swapping import swap

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HINTS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EFBIG: "this file system or your limit (ulimit -f) allows no file that large",
    errno.EACCES: "choose a folder that you may write to, and close programs that use the file",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a disk that can be written to",
    errno.EEXIST: "a part of the path is a file; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0) if os.name == "nt" else ()
_QUOTA = getattr(errno, "EDQUOT", errno.ENOSPC)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence why an output cannot be written.

    Raises:
        OutputError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        code = errno.ENOSPC if error.errno == _QUOTA else error.errno
        hint = _HINTS.get(code or 0, "try another folder")
        raise OutputError(
            f"{path}: expected to write the output, found '{error.strerror or error}'; {hint}."
        ) from error


def check_file(path: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Path:
    """Check that a file may be written, and return where: symbolic links are followed.

    Raises:
        OutputError: it exists, is an input, a folder, a device or a pipe, or is named as a pickle.
    """
    if path.suffix.lower() in _PICKLES:
        raise OutputError(
            f"{path}: expected a name ending in .safetensors, found {path.suffix}; "
            "lorakit writes safetensors only."
        )
    place = _real(path)
    _check_inputs(path, place, inputs)
    if place.is_dir():
        raise OutputError(f"{path}: expected a file, found a folder; name a file in it.")
    if place.exists() and not place.is_file():
        raise OutputError(
            f"{path}: expected a file or a new name, found a device or a pipe, which would be "
            "replaced by a file; name a file."
        )
    if place.exists() and not overwrite:
        raise OutputError(
            f"{path}: expected a new file, found an existing one; use --overwrite or another name."
        )
    return place


def check_folder(
    path: Path, *, overwrite: bool, inputs: Sequence[Path], names: Sequence[str]
) -> Path:
    """Check that a folder may be written whole, and return where.

    Args:
        path: the folder.
        overwrite: replace an existing one; it may hold no file but those in `names`.
        inputs: what must never be replaced.
        names: the files to be written, relative to it.

    Raises:
        OutputError: it exists, is an input, lies in one or holds one, is a file, or holds other
            files; or a name leads out of it.
    """
    outside = [name for name in names if _leads_out(name)]
    if outside:
        raise OutputError(
            f"{path}: expected names of files in it, found {outside[0]!r}; nothing is written "
            "outside of it."
        )
    place = _real(path)
    _check_inputs(path, place, inputs)
    for given in inputs:
        if given.is_dir() and lies_in(place, given):
            raise OutputError(f"{path} lies inside the input {given}; choose another folder.")
        if lies_in(Path(os.path.realpath(given)), place):
            raise OutputError(
                f"{path} holds the input {given}; inputs are never replaced, choose another folder."
            )
    if place.exists() and not place.is_dir():
        raise OutputError(f"{path}: expected a folder, found a file; choose another name.")
    there = [_relative(file, place) for file in _files(place)] if place.is_dir() else []
    if there and not overwrite:
        raise OutputError(
            f"{path}: expected a new folder, found {len(there)} files in it; "
            "use --overwrite or another name."
        )
    others = [name for name in there if name not in names]
    if others:
        raise OutputError(
            f"{path}: expected only files that the output replaces, found {', '.join(others[:5])}; "
            "choose another folder, or empty this one."
        )
    return place


def lies_in(inner: Path, outer: Path) -> bool:
    """Tell whether a path, links followed, lies in a folder, whatever that is called on the way.

    Names tell nothing where case or the spelling of accents does not count, as on macOS.
    """
    if not outer.exists():
        return False
    return any(parent.exists() and parent.samefile(outer) for parent in inner.parents)


def check_space(path: Path, place: Path, needed: int) -> None:
    """Check that the disk of an output has room for it, what killed runs left beside it removed.

    Raises:
        OutputError: it has not.
    """
    remove_leftovers(place)
    folder = place
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    with writing(path):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{path}: expected {needed:,} free bytes, found {free:,}; "
            "free some space or choose another disk."
        )


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends well, all at once.

    Raises:
        OutputError: instead of any OSError, also of the block; then nothing is left behind.
    """
    temporary = sibling(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Python asks for 0o666, of which the umask takes its part.
            with ExitStack() as stack:
                with open(temporary, "xb", buffering=0) as file:
                    stack.enter_context(held(temporary))
                    yield file
                    _copy_mode(path, temporary)
                    os.fsync(file.fileno())
                _patiently(lambda: temporary.replace(path))
            _sync_folder(path.parent)
    finally:
        # What already went wrong is what has to be told.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Make a new folder that takes the place of `path` when the block ends well.

    Raises:
        OutputError: instead of any OSError, also of the block; then nothing is left behind.
    """
    temporary = sibling(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            with held(temporary):
                yield temporary
                for file in _files(temporary):
                    _sync_file(file)
                _take_place(temporary, path)
                _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`; what was there before has the temporary name then, or is gone."""
    if not path.exists():
        _patiently(lambda: temporary.rename(path))
        return
    if swap(temporary, path):
        return
    # For a moment neither is there. A run that is killed just then leaves the old folder under a
    # name that no later run removes.
    old = sibling(path).with_suffix(".old")
    _patiently(lambda: path.rename(old))
    try:
        _patiently(lambda: temporary.rename(path))
    finally:
        if not path.exists():
            old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _patiently(step: Callable[[], object]) -> None:
    """Try a step again while another program, a scanner of new files say, holds one of its files.

    Only Windows keeps a file from being renamed because it is open.
    """
    for seconds in _WAITS:
        try:
            step()
            return
        except PermissionError:
            time.sleep(seconds)
    step()


def _real(path: Path) -> Path:
    """Follow symbolic links, also to where nothing is yet."""
    why = no_file_on_windows(path) if os.name == "nt" else None
    if why is not None:
        raise OutputError(f"{path}: expected a file's name, but {why}; choose another name.")
    try:
        place = Path(os.path.realpath(path))
    except ValueError:
        raise OutputError(f"{str(path)!r} is no name for a file; choose another name.") from None
    if place.is_symlink():
        raise OutputError(
            f"{path}: expected a file or a new name, found a symbolic link that leads in a circle; "
            "remove it or choose another name."
        )
    return place


def _check_inputs(path: Path, place: Path, inputs: Sequence[Path]) -> None:
    for given in inputs:
        inside = given.is_dir() and lies_in(place, given)
        if place.exists() and given.exists() and (inside or place.samefile(given)):
            where = "in the input" if inside else "the input"
            raise OutputError(
                f"{path} is {where} {given}; inputs are never replaced, choose another name."
            )


def _leads_out(name: str) -> bool:
    path = Path(name)
    return not path.parts or bool(path.anchor) or ".." in path.parts


def _copy_mode(old: Path, new: Path) -> None:
    if os.name == "posix" and old.exists():
        new.chmod(stat.S_IMODE(old.stat().st_mode) & 0o777)


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("*") if not entry.is_dir())


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _sync_file(file: Path) -> None:
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    # Where a folder cannot be opened (Windows) or synced, the file itself is safe already.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
