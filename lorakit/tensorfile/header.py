"""The safetensors header: where each tensor lies, strictly checked, without torch or numpy.

Source: the format of safetensors 0.8, https://github.com/huggingface/safetensors.
    - stricter: a key that occurs twice is refused
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeGuard

from lorakit.errors import FileFormatError, OutputError
from lorakit.tensorfile.reading import (
    MAX_HEADER,
    Stamp,
    open_regular,
    read_exactly,
    reading,
    stamp_of,
    what_it_is,
)

METADATA_KEY = "__metadata__"

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    # In the order of safetensors' own enumeration: `save_order` follows it.
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_SCALARS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f"} | {
    "I64": "q",
    "I32": "i",
    "I16": "h",
    "I8": "b",
    "U64": "Q",
    "U32": "I",
    "U16": "H",
    "U8": "B",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor is before its bytes are read: safetensors' name of the dtype, and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in a file."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes lie in a file, and which file that was when its header was read."""

    path: Path
    offset: int
    length: int
    stamp: Stamp | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header; `specs` and `extents` are in the order of the bytes in the file.

    `stamp` tells the file that it was read from.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]
    extents: Mapping[str, Extent]
    data_start: int
    size: int
    stamp: Stamp


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FileFormatError: it is no safetensors file, or one that contradicts itself.
    """
    path = Path(path)
    with open_regular(path) as file, reading(path):
        stamp, start = stamp_of(file), file.read(64)
        size = stamp[1]
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            _refuse_start(path, start, size, length)
        raw = bytearray(length)
        file.seek(8)
        read_exactly(file, path, memoryview(raw))
    return _parse(path, bytes(raw), start, stamp)


def format_header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """Return the header's bytes as safetensors' `save_file` writes them, tensors in this order.

    Metadata keys are sorted, where safetensors' own order changes from run to run; empty metadata
    is left out.

    Raises:
        OutputError: a name or a metadata value cannot be stored, or the header is too large.
    """
    if METADATA_KEY in specs:
        raise OutputError(f"Expected tensor names, found '{METADATA_KEY}'; rename that tensor.")
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    if wrong:
        raise OutputError(
            f"Metadata '{wrong[0]}': expected text, found {_short(metadata[wrong[0]])}; "
            "store it as text."
        )
    table: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for key, spec in specs.items():
        end = position + spec.nbytes
        table[key] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (position, end),
        }
        position = end
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"Header: expected valid Unicode, found {_short(error.object[error.start : error.end])}"
            " in a name or in the metadata; change that text."
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(
            f"Header: expected at most {MAX_HEADER} bytes, found {len(text)}; store less metadata."
        )
    return struct.pack("<Q", len(text)) + text


def save_order(specs: Mapping[str, Spec]) -> list[str]:
    """Return the keys in the order of safetensors' `save_file`: widest dtype first, then name."""
    return sorted(specs, key=lambda key: (-_RANK[specs[key].dtype], key))


def layout(specs: Mapping[str, Spec]) -> list[str]:
    """Return the keys in the order in which lorakit stores them.

    It is the given order, unless a tensor would then start off the grid of its dtype, which readers
    that view the mapped file refuse: then it is `save_order`.
    """
    position = 0
    for spec in specs.values():
        if spec.nbytes and position % max(1, DTYPE_BITS[spec.dtype] // 8):
            return save_order(specs)
        position += spec.nbytes
    return list(specs)


def read_scalars(path: str | Path, header: Header, keys: Iterable[str]) -> dict[str, float]:
    """Read tensors of one element; what has more, or a dtype of another kind, is left out.

    Raises:
        FileFormatError: the file cannot be read.
    """
    path, specs, found = Path(path), header.specs, {}
    with open_regular(path) as file, reading(path):
        for key in keys:
            if specs[key].numel == 1 and specs[key].dtype in _SCALARS:
                raw = bytearray(header.extents[key].length)
                file.seek(header.extents[key].offset)
                read_exactly(file, path, memoryview(raw))
                found[key] = _number(specs[key].dtype, raw)
    return found


def _number(dtype: str, raw: bytearray) -> float:
    if dtype == "BF16":
        raw[:0] = b"\0\0"
    return float(struct.unpack("<" + _SCALARS[dtype], raw)[0])


def _refuse(path: Path, expected: str, found: str, advice: str) -> NoReturn:
    raise FileFormatError(f"{path}: expected {_line(expected)}, found {_line(found)}; {advice}.")


def _line(text: str) -> str:
    # Names come from the file: one must not break the sentence, or steer a terminal.
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def _refuse_start(path: Path, start: bytes, size: int, length: int) -> NoReturn:
    known = what_it_is(start)
    if known is not None:
        _refuse(path, "a safetensors file", *known)
    if size < 8:
        found = "an empty file" if size == 0 else f"{size} bytes"
        _refuse(path, "a safetensors file of 8 bytes at least", found, "get the file again")
    if length > MAX_HEADER:
        found = f"a header length of {length}"
        _refuse(path, f"a header of at most {MAX_HEADER} bytes", found, "it is no safetensors file")
    found = f"{size} bytes"
    advice = "it was cut off or is no safetensors file, get it again"
    _refuse(path, f"a header of {length} bytes", found, advice)


def _parse(path: Path, raw: bytes, start: bytes, stamp: Stamp) -> Header:
    size = stamp[1]
    table = _load(path, raw, start)
    metadata = _metadata(path, table.pop(METADATA_KEY, None))
    data_start = 8 + len(raw)
    entries = sorted((_entry(path, *item) for item in table.items()), key=lambda item: item[2:])
    _check_layout(path, entries, size - data_start)
    return Header(
        specs={name: spec for name, spec, _, _ in entries},
        metadata=metadata,
        extents={
            name: Extent(path, data_start + begin, end - begin, stamp)
            for name, _, begin, end in entries
        },
        data_start=data_start,
        size=size,
        stamp=stamp,
    )


class _Refused(ValueError):
    """JSON that Python reads and safetensors does not."""


def _load(path: Path, raw: bytes, start: bytes) -> dict[str, object]:
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        known = what_it_is(start)
        if known is not None:
            _refuse(path, "a safetensors file", *known)
        _refuse(path, "a JSON header", _why(error), "the file is damaged, get it again")
    if not isinstance(table, dict):
        _refuse(path, "a JSON object as header", _short(table), "the file is damaged, get it again")
    return table


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "one that is nested too deeply"
    if isinstance(error, UnicodeError):
        return "text that is no valid Unicode"
    return str(error)[:100] if isinstance(error, _Refused) else f"broken JSON ({error})"[:100]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        left = list(table)
        twice = next(key for key, _ in pairs if not left or key != left.pop(0))
        raise _Refused(f"the key '{twice}' twice")
    "".join(table).encode()
    return table


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"the number {name}")


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    advice = "repair the header with the tool that wrote it"
    if not isinstance(value, dict):
        _refuse(path, f"{METADATA_KEY} to be an object", _short(value), advice)
    wrong = [key for key, text in value.items() if not isinstance(text, str)]
    if wrong:
        _refuse(path, f"text as metadata '{wrong[0]}'", _short(value[wrong[0]]), advice)
    try:
        "".join(value.values()).encode()
    except UnicodeEncodeError:
        _refuse(path, "metadata in valid Unicode", "half a surrogate pair", advice)
    return dict(value)


_Entry = tuple[str, Spec, int, int]


def _entry(path: Path, name: str, value: object) -> _Entry:
    advice = "the file is damaged, get it again"
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        advice = "it needs a newer lorakit, or is damaged"
        _refuse(path, f"{name} to have a dtype of safetensors", _short(dtype), advice)
    if not _are_sizes(shape):
        _refuse(path, f"{name} to have a shape of whole numbers", _short(shape), advice)
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"{name} to have two data_offsets", _short(offsets), advice)
    # Zero-size tensors must not hide extents whose product torch cannot hold.
    if math.prod(size for size in shape if size) >= 2**60:
        _refuse(path, f"{name} to have fewer than 2^60 elements", _short(shape), advice)
    spec = Spec(dtype, tuple(shape))
    begin, end = offsets
    if spec.numel * DTYPE_BITS[dtype] != 8 * (end - begin):
        wanted = f"{name} ({dtype}, {list(shape)}) to take {spec.nbytes} bytes"
        _refuse(path, wanted, f"bytes {begin} to {end}", advice)
    return name, spec, begin, end


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(path: Path, entries: Iterable[_Entry], room: int) -> None:
    advice = "the file is damaged, get it again"
    position = 0
    for name, _, begin, end in entries:
        if begin != position:
            kind = "a hole" if begin > position else "an overlap"
            _refuse(path, f"{name} to begin at byte {position}", f"{begin}, {kind}", advice)
        position = end
    if position > room:
        _refuse(path, f"{position} bytes of tensors", str(room), "it was cut off, get it again")
    if position < room:
        _refuse(path, f"{position} bytes of tensors", f"{room - position} more after them", advice)


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
