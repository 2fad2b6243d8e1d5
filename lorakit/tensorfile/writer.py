"""From a source to disk: streaming, atomic, in the layout of safetensors' own writer."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from lorakit.compute import Compute
from lorakit.errors import LorakitError, OutputError
from lorakit.progress import Progress, silent
from lorakit.tensorfile.casting import cast, changes
from lorakit.tensorfile.companions import companions
from lorakit.tensorfile.copying import copy_extent
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.multifile import MultiFileSource
from lorakit.tensorfile.plain import TensorSource, check_unchanged, root_of
from lorakit.tensorfile.readback import check_beside, check_header
from lorakit.tensorfile.reading import read_small, reading
from lorakit.tensorfile.replacing import (
    check_file,
    check_folder,
    check_space,
    replaced_file,
    replaced_folder,
    writing,
)
from lorakit.tensorfile.streaming import WHAT, size_of, stream

__all__ = ["Written", "cast", "write_folder", "write_model", "write_safetensors"]

Check = Callable[[Path], None]
"""Given the place of an output that is complete and not yet in its place; what it raises leaves
all as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: a file or a folder, and its bytes."""

    path: Path
    nbytes: int


def write_safetensors(
    path: str | Path,
    source: TensorSource,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    compute: Compute | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Written:
    """Write a source as one safetensors file, which appears whole or not at all.

    Args:
        path: the file; folders are made, symbolic links followed.
        source: stored tensors are copied byte for byte, others computed and rounded once.
        overwrite: replace an existing file.
        inputs: files and folders that must never be replaced.
        compute: workers and the bytes in flight; one worker a core by default.
        progress: told the bytes written.
        check: asked before the output takes its place.

    Raises:
        OutputError: the output exists, is an input, or cannot be written.
        NumericsError: a value is not finite or does not fit its dtype.
        FileFormatError: an input cannot be read whole.

    Cost: one read and one write of each byte; memory as `compute` bounds it.
    """
    path = Path(path)
    given = _never_replaced(source, inputs)
    with writing(path):
        place = check_file(path, overwrite=overwrite, inputs=given)
    check_space(path, place, size_of(source))
    with replaced_file(place) as file, _called(path, temporary := Path(file.name)):
        written = stream(
            file, source, compute=compute or Compute.of(device="cpu"), progress=progress or silent
        )
        check_unchanged(source)
        if check is not None:
            check_header(temporary, written.header)
            check(temporary)
        # Another process may have written it meanwhile.
        check_file(path, overwrite=overwrite, inputs=given)
    return Written(path=path, nbytes=written.nbytes)


def write_folder(
    path: str | Path,
    parts: Mapping[str, TensorSource],
    *,
    texts: Mapping[str, str] | None = None,
    copies: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    compute: Compute | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Written:
    """Write a folder of safetensors files and what belongs to them, whole or not at all.

    Args:
        path: the folder; an existing one that holds other files than these is refused.
        parts: relative path, with forward slashes -> the source of that file.
        texts: relative path -> its text.
        copies: relative path -> the file to copy there.
        overwrite: replace an existing folder.
        inputs: files and folders that must never be replaced.
        compute: workers and the bytes in flight.
        progress: told the bytes of all safetensors files together.
        check: asked before the output takes its place.

    Raises:
        OutputError: the output exists, is an input, or cannot be written.
        NumericsError: a value is not finite or does not fit its dtype.
        FileFormatError: an input cannot be read whole.
    """
    path, texts, copies = Path(path), texts or {}, copies or {}
    names = [*parts, *texts, *copies]
    given = [Path(item) for item in inputs]
    with writing(path):
        place = check_folder(path, overwrite=overwrite, inputs=given, names=names)
    sizes = {name: size_of(part) for name, part in parts.items()}
    rest = sum(len(text.encode()) for text in texts.values())
    rest += sum(_size(file) for file in copies.values())
    total = sum(sizes.values())
    check_space(path, place, total + rest)
    compute = compute or Compute.of(device="cpu")
    tell = _with_total(progress or silent, total)
    with replaced_folder(place) as folder, _called(path, folder):
        done, headers = 0, {}
        for name, part in parts.items():
            with open(_made(folder / name), "xb", buffering=0) as file:
                written = stream(file, part, compute=compute, progress=tell, before=done)
            done += written.nbytes
            headers[name] = written.header
            check_unchanged(part)
        for name, text in texts.items():
            _made(folder / name).write_bytes(text.encode())
        for name, origin in copies.items():
            with open(_made(folder / name), "xb", buffering=0) as file:
                for _ in copy_extent(Extent(origin, 0, _size(origin)), file):
                    pass
        if check is not None:
            for name, header in headers.items():
                check_header(folder / name, header)
            check_beside(folder, texts, copies)
            check(folder)
        # Another process may have written there meanwhile.
        check_folder(path, overwrite=overwrite, inputs=given, names=names)
    return Written(path=path, nbytes=total + rest)


def write_model(
    path: str | Path,
    source: TensorSource,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    compute: Compute | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Written:
    """Write a model in the form of the one that it derives from: a file, or a folder like its own.

    In a folder every file keeps its name; configurations and tokenizers are copied, weights in
    other formats or variants are not. A sharded model may also become one `.safetensors` file.

    Raises:
        OutputError: the output exists, is an input, cannot be written, or has the wrong form.
        NumericsError: a value is not finite or does not fit its dtype.
        FileFormatError: an input cannot be read whole.
    """
    path = Path(path)
    root = root_of(source)
    given = [Path(item) for item in inputs]
    if not isinstance(root, MultiFileSource) or path.suffix.lower() == ".safetensors":
        if isinstance(root, MultiFileSource) and len({Path(f).parent for f in root.files}) > 1:
            raise OutputError(
                f"{path}: expected a folder's name, because {root.name} has components in folders, "
                "found a file's; leave .safetensors out."
            )
        return write_safetensors(
            path,
            source,
            overwrite=overwrite,
            inputs=given,
            compute=compute,
            progress=progress,
            check=check,
        )
    parts = {name: _Part.of(name, source, root) for name in root.files}
    texts = _indexes(source, root)
    return write_folder(
        path,
        parts,
        texts=texts,
        copies={name: file for name, file in companions(root).items() if name not in texts},
        overwrite=overwrite,
        inputs=[*given, root.root],
        compute=compute,
        progress=progress,
        check=check,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """The tensors of a source that one of its files holds, under that file's keys.

    `parts` is that file.
    """

    name: str
    source: TensorSource
    keys: Mapping[str, str]
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]
    parts: Mapping[str, TensorSource]

    @staticmethod
    def of(name: str, source: TensorSource, root: MultiFileSource) -> "_Part":
        """Cut a file out of a source; its own metadata takes over what the source changed."""
        # A source may hide keys: the scales of fp8 that is written as something else.
        keys = {inner: key for inner, key in root.files[name].items() if key in source.specs}
        changed = {k: v for k, v in source.metadata.items() if root.metadata.get(k) != v}
        own = {
            key: text
            for key, text in root.parts[name].metadata.items()
            if key in source.metadata or key not in root.metadata
        }
        return _Part(
            name=f"{source.name}: {name}",
            source=source,
            keys=keys,
            specs={inner: source.specs[key] for inner, key in keys.items()},
            metadata=own | changed,
            parts={name: root.parts[name]},
        )

    @property
    def base(self) -> "_Part | None":
        """The same cut of the source's base."""
        base = getattr(self.source, "base", None)
        if base is None:
            return None
        keys = {inner: key for inner, key in self.keys.items() if key in base.specs}
        specs = {inner: base.specs[key] for inner, key in keys.items()}
        return _Part(
            name=self.name, source=base, keys=keys, specs=specs, metadata={}, parts=self.parts
        )

    def get(self, key: str) -> Tensor:
        """Read a tensor."""
        return self.source.get(self.keys[key])

    def changes(self, key: str) -> bool:
        """Tell whether the source says that it changes a tensor."""
        return changes(self.source, self.keys[key])

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie."""
        return self.source.extent(self.keys[key])


def _never_replaced(source: TensorSource, inputs: Sequence[str | Path]) -> list[Path]:
    """Return the inputs, and the files of a model of several: one of them is never the output."""
    root = root_of(source)
    files = [root.root / name for name in root.files] if isinstance(root, MultiFileSource) else []
    return [*(Path(item) for item in inputs), *files]


def _indexes(source: TensorSource, root: MultiFileSource) -> dict[str, str]:
    """Return the indexes whose total size another dtype has changed, hidden keys left out."""
    texts = {}
    for index in root.indexes:
        folder = PurePosixPath(index).parent
        keys = {
            inner: key
            for name, held in root.files.items()
            if PurePosixPath(name).parent == folder
            for inner, key in held.items()
        }
        hidden = [inner for inner, key in keys.items() if key not in source.specs]
        before = sum(root.specs[key].nbytes for key in keys.values())
        after = sum(source.specs[key].nbytes for key in keys.values() if key in source.specs)
        grown = after - before
        table = json.loads(read_small(root.root / index))
        for inner in hidden:
            table["weight_map"].pop(inner, None)
        about = table.get("metadata")
        if grown and isinstance(about, dict) and isinstance(about.get("total_size"), int):
            about["total_size"] += grown
            texts[index] = json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return texts


@contextmanager
def _called(path: Path, temporary: Path) -> Iterator[None]:
    """Let what is said of the temporary file be said of the output."""
    try:
        yield
    except LorakitError as error:
        raise type(error)(str(error).replace(str(temporary), str(path))) from error


def _with_total(progress: Progress, total: int) -> Progress:
    return lambda _what, done, _total: progress(WHAT, done, total)


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _size(file: Path) -> int:
    with reading(file):
        return file.stat().st_size
