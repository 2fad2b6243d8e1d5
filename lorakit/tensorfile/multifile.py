"""Models of several files: shards with their index, and diffusers or transformers folders."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.plain import FileSource
from lorakit.tensorfile.reading import parse_json, read_small, reading

_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_STEM = r"(?:model|diffusion_pytorch_model|pytorch_model)"
_WEIGHTS = re.compile(rf"{_STEM}(?:\.(?P<variant>[\w-]+))?\.safetensors")
_INDEX = re.compile(rf"{_STEM}(?:\.(?P<a>[\w-]+))?\.safetensors\.index(?:\.(?P<b>[\w-]+))?\.json")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MultiFileSource:
    """Several safetensors files read as one.

    `files` maps each file, relative to `root` with forward slashes, to {key in it: key here};
    `places` maps back; `indexes` are the index files that were followed. `metadata` is what all
    files agree on.
    """

    name: str
    root: Path
    parts: Mapping[str, FileSource]
    files: Mapping[str, Mapping[str, str]]
    places: Mapping[str, tuple[str, str]]
    indexes: tuple[str, ...]
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]

    def get(self, key: str) -> Tensor:
        """Read a tensor from the file that holds it.

        Raises:
            FileFormatError: the file cannot be read, has changed, or torch lacks the dtype.
        """
        file, inner = self.places[key]
        return self.parts[file].get(inner)

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie."""
        file, inner = self.places[key]
        return self.parts[file].extent(inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The weight files of one folder, and the index that names them."""

    files: tuple[str, ...]
    index: str | None


def open_shards(index: Path) -> MultiFileSource:
    """Open the files that an index names.

    Raises:
        FileFormatError: the index is damaged, or does not fit the files.
    """
    found = _Found(files=tuple(dict.fromkeys(_weight_map(index).values())), index=index.name)
    return _join(str(index), index.parent, {"": found})


def open_folder(folder: Path) -> MultiFileSource:
    """Open the weights of a folder, or of the folders of its components.

    Keys of a component begin with its folder's name: `unet/down_blocks.0…`. Where there are several
    variants, the one without a name (`model.safetensors` beside `model.fp16.safetensors`) is taken,
    as diffusers does.

    Raises:
        FileFormatError: there are no weights, or several variants and none without a name.
    """
    found: dict[str, _Found] = {}
    pipeline = (folder / "model_index.json").is_file()
    own = None if pipeline else _find(folder)
    if own is not None:
        found[""] = own
    else:
        with reading(folder):
            below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        for place in below:
            weights = None if place.name.startswith(".") else _find(place)
            if weights is not None:
                found[place.name] = weights
    if not found:
        _refuse_folder(folder)
    return _join(str(folder), folder, found)


def index_of_shard(path: Path) -> Path | None:
    """Return the index of the set that a file is one part of, None for a file that is whole.

    Raises:
        FileFormatError: it is named as a part and no index beside it names it.
    """
    if not _SHARD.search(path.name):
        return None
    for index in sorted(path.parent.glob("*.json")):
        if ".index." in index.name and path.name in _weight_map(index).values():
            return index
    raise FileFormatError(
        f"{path}: expected an index (.safetensors.index.json) beside this part of a model, found "
        "none that names it; get the index too."
    )


def _find(folder: Path) -> _Found | None:
    variants: dict[str, list[_Found]] = {}
    with reading(folder):
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for name in names:
        single, index = _WEIGHTS.fullmatch(name), _INDEX.fullmatch(name)
        if single is not None and not _SHARD.search(name):
            variants.setdefault(single["variant"] or "", []).append(
                _Found(files=(name,), index=None)
            )
        elif index is not None:
            files = tuple(dict.fromkeys(_weight_map(folder / name).values()))
            variant = index["a"] or index["b"] or ""
            variants.setdefault(variant, []).append(_Found(files=files, index=name))
    if not variants:
        return None
    if "" not in variants and len(variants) > 1:
        raise FileFormatError(
            f"{folder}: expected one variant of the weights, found {', '.join(variants)}; "
            "leave one of them in the folder."
        )
    chosen = variants.get("") or next(iter(variants.values()))
    if len(chosen) > 1:
        several = ", ".join(found.index or found.files[0] for found in chosen)
        raise FileFormatError(
            f"{folder}: expected one set of weights, found {several}; leave one in the folder."
        )
    return chosen[0]


def _refuse_folder(folder: Path) -> None:
    with reading(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    endings = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
    near = [name for name in names if name.endswith(endings)]
    hint = f"name the file itself: {near[0]}" if near else "name a file or a model's folder"
    raise FileFormatError(
        f"{folder}: expected a model's folder (model.safetensors, diffusion_pytorch_model."
        f"safetensors, or one of them a component), found {', '.join(names[:5]) or 'nothing'}; "
        f"{hint}."
    )


def _weight_map(index: Path) -> dict[str, str]:
    raw = read_small(index)
    try:
        table = parse_json(raw)
    except ValueError:
        table = None
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names:
        raise FileFormatError(
            f"{index}: expected an index with a weight_map, found none; get the file again."
        )
    for key, name in names.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise FileFormatError(
                f"{index}: expected a file beside it as the place of {key}, found {name!r}; "
                "get the index again."
            )
    return names


def _is_plain(name: str) -> bool:
    # An index from elsewhere must not lead out of its folder.
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(name) and ":" not in name and not path.is_absolute() and ".." not in path.parts


def _join(name: str, root: Path, found: Mapping[str, _Found]) -> MultiFileSource:
    parts: dict[str, FileSource] = {}
    files: dict[str, dict[str, str]] = {}
    for component, weights in found.items():
        below = f"{component}/" if component else ""
        for file in weights.files:
            parts[below + file] = part = FileSource.of(root / component / file)
            files[below + file] = {key: below + key for key in part.specs}
        if weights.index is not None:
            held = {key: file for file in weights.files for key in files[below + file]}
            _check_index(root / component / weights.index, held)
    places = {key: (file, inner) for file, keys in files.items() for inner, key in keys.items()}
    return MultiFileSource(
        name=name,
        root=root,
        parts=parts,
        files=files,
        places=places,
        indexes=tuple(f"{c}/{w.index}" if c else w.index for c, w in found.items() if w.index),
        specs={key: parts[file].specs[inner] for key, (file, inner) in places.items()},
        metadata=_common([part.metadata for part in parts.values()]),
    )


def _check_index(index: Path, held: Mapping[str, str]) -> None:
    named = _weight_map(index)
    wrong = [key for key in {**named, **held} if named.get(key) != held.get(key)]
    if wrong:
        key = wrong[0]
        raise FileFormatError(
            f"{index}: expected {key} in {named.get(key, 'none of the files')}, found it in "
            f"{held.get(key, 'none of them')}; the files and the index are not of one set, get "
            "them again."
        )


def _common(all_metadata: list[Mapping[str, str]]) -> dict[str, str]:
    first, *others = all_metadata
    return {key: text for key, text in first.items() if all(m.get(key) == text for m in others)}
