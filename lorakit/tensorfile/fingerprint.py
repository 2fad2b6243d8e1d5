"""What tells a file from another of its name, without reading it whole."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

from lorakit.tensorfile.dtypes import bytes_of
from lorakit.tensorfile.plain import TensorSource
from lorakit.tensorfile.reading import open_regular, read_exactly, reading

SAMPLES = 64
SAMPLE_BYTES = 4096


def header_hash(source: TensorSource, texts: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of what stands beside the tensors' bytes.

    Args:
        source: its keys, dtypes and shapes in the order of the file, and its metadata; of each
            file where there are several.
        texts: more that belongs to it: PEFT's configurations, by name.
    """
    parts: Mapping[str, TensorSource] = getattr(source, "parts", None) or {"": source}
    said = {
        name: {
            "metadata": dict(part.metadata),
            "tensors": [[key, spec.dtype, spec.shape] for key, spec in part.specs.items()],
        }
        for name, part in parts.items()
    }
    text = json.dumps([said, dict(texts or {})], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sample_hash(source: TensorSource) -> str:
    """Return the SHA-256 of 64 pieces of 4 KiB that are spread evenly over the tensors' bytes.

    Models of one architecture often have equal headers; a tuning changes bytes everywhere.

    Cost: 64 short reads, whatever the size.
    """
    specs = dict(source.specs)
    keys, ends = list(specs), list(accumulate(spec.nbytes for spec in specs.values()))
    total = ends[-1] if ends else 0
    digest = hashlib.sha256()
    for number in range(SAMPLES if total else 0):
        position = total * (2 * number + 1) // (2 * SAMPLES)
        place = bisect_right(ends, position)
        nbytes = specs[keys[place]].nbytes
        start = position - (ends[place] - nbytes)
        digest.update(_piece(source, keys[place], start, min(SAMPLE_BYTES, nbytes - start)))
    return digest.hexdigest()


def _piece(source: TensorSource, key: str, start: int, length: int) -> bytes | memoryview:
    extent = source.extent(key)
    if extent is None:
        return bytes_of(source.get(key))[start : start + length]
    piece = bytearray(length)
    with open_regular(extent.path) as file:
        with reading(extent.path):
            file.seek(extent.offset + start)
        read_exactly(file, extent.path, memoryview(piece))
    return bytes(piece)
