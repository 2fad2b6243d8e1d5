"""Pickled checkpoints (.ckpt, .pt, .pth, .bin), read without running anything that they hold."""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lorakit.errors import FileFormatError
from lorakit.tensorfile.plain import DictSource
from lorakit.tensorfile.reading import ZIP_MAGIC, file_size, open_regular, reading

_MISTAKEN = ".safetensors"
"""By this ending, torch takes a path for what it ends with, whatever it holds."""
_SAFE = (2, 10)
"""The torch whose safe unpickler can be trusted: CVE-2026-24747 is mended there."""
_SHARED = 4
"""How often the bytes of a file may be counted in its tensors, which may share them."""
_SMALL = 2**24
_WRAPPERS = ("state_dict", "module", "model")
_MAX_WRAPPERS = 4

# Bookkeeping of trainers, common in checkpoints and needed by none of the tensors.
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Int64DType",
    "_codecs.encode",
)
# What torch raises at pickles that are damaged, or not its own; it promises no narrower set.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    struct.error,
)


class _Inert:
    """Stands for every harmless global: takes whatever it is given and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""

    def __hash__(self) -> int:
        """Serve as a key of a dict."""
        return 0


class PickleSource(DictSource):
    """The tensors of a pickled checkpoint.

    `skipped` names the entries beside the tensors that are none, such as a step count.
    """

    __slots__ = ("path", "skipped")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        entries = _state_dict(self.path, _load(self.path))
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        self.skipped = tuple(str(key) for key in entries if key not in tensors)
        _check_claims(self.path, tensors.values())
        super().__init__(cast(dict[str, Tensor], tensors), name=str(path))


def _load(path: Path) -> object:
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < _SAFE:
        raise FileFormatError(
            f"{path}: expected torch 2.10 or newer to read a pickled checkpoint safely, found "
            f"{torch.__version__}; update torch, or get the file as safetensors."
        )
    with open_regular(path) as opened, reading(path):
        # A zip can stay on disk until a tensor is asked for; the older format cannot.
        mapped = opened.read(4) == ZIP_MAGIC
        if mapped:
            _check_archive(path, opened)
    allowed: list[Any] = [(_Inert, name) for name in _HARMLESS]
    try:
        with reading(path), warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            # torch warns of its own deprecations while it reads old files.
            warnings.simplefilter("ignore")
            if mapped and path.suffix != _MISTAKEN:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(_why_refused(path, str(error))) from None
    except _DAMAGE as error:
        raise FileFormatError(_damaged(path, error)) from None


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Check that nothing in a zip unpacks to more than it takes: torch.save never compresses."""
    size = file_size(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise FileFormatError(_damaged(path, error)) from None
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size:
        raise FileFormatError(
            f"{path}: expected a checkpoint as torch.save writes it, not compressed, found one "
            "that unpacks to more than it takes; get it as safetensors."
        )


def _check_claims(path: Path, tensors: Iterable[Tensor]) -> None:
    """Check that the tensors are not of more bytes than the file can have."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with reading(path):
        size = path.stat().st_size
    if claimed > _SHARED * size + _SMALL:
        raise FileFormatError(
            f"{path}: expected tensors of at most {_SHARED * size} bytes, found {claimed} in "
            f"{size} of the file; it is damaged or made to fill your memory, get it as safetensors."
        )


def _damaged(path: Path, error: object) -> str:
    return (
        f"{path}: expected a checkpoint written by torch.save, found one that torch cannot read "
        f"({_first_line(error)}); get the file again, or convert it to safetensors."
    )


def _why_refused(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message) or re.search(r"[`'\"]?([\w.]+\.[\w.]+)", message)
    what = re.search(r"function (<.*?>)", message) or found
    name = what.group(1) if what else _first_line(message)
    return (
        f"{path}: expected tensors only, found code: {name}; it was not run, and lorakit never "
        "will: get the file as safetensors, or convert it where you trust it."
    )


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


def _state_dict(path: Path, loaded: object) -> Mapping[object, object]:
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(loaded, Mapping):
            break
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inner and any(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        nested = inner or [value for value in loaded.values() if isinstance(value, Mapping)]
        if not inner and len(nested) != 1:
            break
        loaded = nested[0]
    raise FileFormatError(
        f"{path}: expected a dict of tensors, also below {', '.join(_WRAPPERS)}, found "
        f"{type(loaded).__name__} without any; save the model's state_dict instead."
    )
