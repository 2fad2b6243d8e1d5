"""What of a size for the whole file is there to spend on directions, and what names cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorakit.adapters import Adapter
from lorakit.errors import SpecError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.names.checkpoints import BIAS
from lorakit.names.dialects import format_key
from lorakit.operations.pieces import Piece
from lorakit.saving import WITH_ALPHA, stored_tensors

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OWN = 2048
"""Bytes at the most of the metadata that the writer adds: hashes, ranks, alphas, modelspec."""
_ALPHA = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Budget:
    """A rank rule whose size, where it has one, is what is left for directions and their names.

    Args:
        rule: the rule.
        names: module -> bytes that it costs besides its directions, where there is a size.
    """

    rule: RankRule
    names: Mapping[str, int] = field(default_factory=dict)


def budget_of(
    pieces: Sequence[Piece],
    rule: RankRule,
    *,
    like: LoraFile,
    kind: str = "lora",
    beside: Mapping[str, Adapter],
) -> Budget:
    """Take out of a size what is written in any case: metadata, norms, biases, other adapters.

    Args:
        pieces: what is cut.
        rule: the rule; without a size it stays as it is.
        like: says names, dtype and metadata, and what textual inversions come along.
        kind: of the adapters that are made: a "dora" has a magnitude besides.
        beside: module -> adapter that is written as it is.

    Raises:
        SpecError: nothing is left.
    """
    if rule.size is None:
        return Budget(rule=rule)
    most, itemsize = rule.size, ITEMSIZE.get(like.dtype, 1)
    kept = replace(like, adapters=dict(beside))
    tensors = stored_tensors(kept, dialect=like.dialect, dtype=like.dtype)
    fixed = OWN + len(json.dumps(dict(like.metadata), ensure_ascii=False).encode())
    fixed += sum(t.nbytes + _entry(key, t.shape, most) for key, t in tensors.items())
    for piece in pieces:
        if piece.vector:
            role = "diff_b" if piece.module.endswith(BIAS) else "diff"
            key = _key(like, piece.module.removesuffix(BIAS), role)
            fixed += itemsize * math.prod(piece.shape) + _entry(key, piece.shape, most)
    if fixed >= rule.size:
        raise SpecError(
            f"--size leaves no room for layers: the metadata, norms and biases of {like.name} take "
            f"{fixed} bytes; give a larger size."
        )
    return Budget(
        rule=replace(rule, size=rule.size - fixed),
        names={
            piece.module: _names(piece, like, most) + _magnitude(piece, like, most, kind)
            for piece in pieces
            if not piece.vector
        },
    )


def _names(piece: Piece, like: LoraFile, most: int) -> int:
    """Return the bytes of a LoRA's entries in the header, and of its alpha."""
    ones = (1,) * (len(piece.shape) - 2)
    rank = piece.rank_bound
    found = _entry(_key(like, piece.module, "up"), (piece.shape[0], rank, *ones), most)
    found += _entry(_key(like, piece.module, "down"), (rank, *piece.shape[1:]), most)
    if like.dialect in WITH_ALPHA:
        found += _entry(_key(like, piece.module, "alpha"), (), most) + _ALPHA
    return found


def _magnitude(piece: Piece, like: LoraFile, most: int, kind: str) -> int:
    """Return the bytes of a DoRA's magnitude by output."""
    if kind != "dora":
        return 0
    key = _key(like, piece.module, "lora_magnitude_vector")
    shape = (piece.shape[0], *(1 for _ in piece.shape[1:]))
    return ITEMSIZE.get(like.dtype, 1) * piece.shape[0] + _entry(key, shape, most)


def _key(like: LoraFile, module: str, role: str) -> str:
    return format_key(module, role, dialect=like.dialect, architecture=like.architecture)


def _entry(key: str, shape: Sequence[int], most: int) -> int:
    """Return the bytes of a tensor's entry in the header, in a file of so many at the most."""
    entry = {key: {"dtype": "BF16", "shape": [*shape], "data_offsets": [most, most]}}
    # The braces around it count for the comma.
    return len(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()) - 1
