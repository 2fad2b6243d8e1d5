"""The hashes that a file tells of itself, taken of its bytes as they are written."""

import hashlib
from collections.abc import Mapping

from lorakit.tensorfile.header import Spec, format_header

MODEL_HASH, LEGACY_HASH, SPEC_HASH = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
HASHES = (MODEL_HASH, LEGACY_HASH, SPEC_HASH)
WINDOW = (0x100000, 0x110000)
"""The bytes of a file that its legacy hash is of."""


class Hashes:
    """Two hashes of a file whose tensors go by: `sshs_model_hash` and `sshs_legacy_hash`.

    The first is of the tensors' bytes; the second begins the SHA-256 of 64 KiB at 1 MiB of the
    file, and is left out where that hash would lie in these bytes itself. `blank` is the header
    with zeros in their places.

    Source: kohya's `precalculate_safetensors_hashes`.
        - the legacy hash is of the written file, not of one with less metadata
    """

    def __init__(self, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self._specs = specs
        self._metadata, self.blank = with_place(specs, {**metadata, MODEL_HASH: "0" * 64})
        self._tensors = hashlib.sha256()
        self._window = bytearray()
        self._position = len(self.blank)

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next bytes of the tensors."""
        self._tensors.update(data)
        start, stop = (min(max(edge - self._position, 0), len(data)) for edge in WINDOW)
        self._window += data[start:stop]
        self._position += len(data)

    def header(self) -> bytes:
        """Return the header with the hashes of all that has gone by, as long as `blank`."""
        self._metadata[MODEL_HASH] = self._tensors.hexdigest()
        if LEGACY_HASH in self._metadata:
            head = format_header(self._specs, self._metadata)
            window = head[slice(*WINDOW)] + self._window
            self._metadata[LEGACY_HASH] = hashlib.sha256(window).hexdigest()[:8]
        return format_header(self._specs, self._metadata)


def with_place(
    specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> tuple[dict[str, str], bytes]:
    """Return metadata with zeros for the legacy hash, and the header that they make.

    The hash is left out where it would lie in the bytes that it is of.
    """
    told = {**metadata, LEGACY_HASH: "0" * 8}
    header = format_header(specs, told)
    # Text in values has its quotes escaped, so this is found as the key only.
    place = header.index(f'"{LEGACY_HASH}":"'.encode()) + len(LEGACY_HASH) + 4
    if place < WINDOW[1] and place + 8 > WINDOW[0]:
        del told[LEGACY_HASH]
        header = format_header(specs, told)
    return told, header
