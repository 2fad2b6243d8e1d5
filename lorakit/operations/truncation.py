"""From the exact ΔW of many modules to a LoRA of the rank that a rule asks for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Dora, Full, Lora, magnitude_for
from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, NumericsError
from lorakit.linalg.factored import Factors, Svd, balanced, dense
from lorakit.linalg.ranks import RankRule, kept, ranks_for_size
from lorakit.linalg.tiles import dense as made
from lorakit.operations.budget import ITEMSIZE
from lorakit.operations.pieces import Piece
from lorakit.operations.spectra import Found, Spectrum, spectra
from lorakit.progress import Progress, silent
from lorakit.report import Row
from lorakit.tensorfile.casting import cast

CANCELS = 1e-6
"""What is left of vectors that cancel, relative: the rounding of fp32 sums."""


def truncate(
    pieces: Sequence[Piece],
    *,
    rule: RankRule,
    compute: Compute,
    alpha: float | None = None,
    dtype: str = "F16",
    method: str = "auto",
    kind: str = "lora",
    names: Mapping[str, int] | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Adapter], tuple[Row, ...]]:
    """Cut each ΔW to the rank that `rule` gives it, optimally, and balance the factors.

    Biases and norms have no rank: they are kept whole.

    Args:
        pieces: one a module, in the order of the rows that come back.
        rule: how many directions to keep; `rule.exact` keeps the numerical rank.
        compute: device, workers, bytes in flight.
        alpha: what to store as alpha, ΔW unchanged; None for the rank.
        dtype: what the tensors are to be stored in: bytes for `rule.size`, and see `Compute`.
        method: for dense ΔW: "auto", "exact" or "fast".
        kind: "lora", "dora", or "full" for ΔW itself.
        names: module -> bytes that it costs besides its directions, for `rule.size`.
        progress: called with (what, done, total).

    Returns:
        The adapters of the modules that keep at least one direction, and a row a piece.
    """
    whole = [piece for piece in pieces if piece.vector or kind == "full"]
    ranked = [piece for piece in pieces if not piece.vector and kind != "full"]
    adapters: dict[str, Adapter] = {}
    rows: dict[str, Row] = {}
    narrow = is_narrow(dtype, alpha=alpha, compute=compute)
    found = spectra(ranked, rule=rule, compute=compute, method=method)
    if rule.size is not None:
        found = _within_size(dict(found), rule, ITEMSIZE.get(dtype, 1), names or {})
    for piece, (spectrum, rank) in found:
        rows[piece.module] = _row(piece, spectrum, rank)
        if rank:
            lora = _adapter(piece, spectrum.svd, rank, alpha)
            adapter: Adapter = lora
            if kind == "dora":
                adapter, rows[piece.module] = as_dora(piece, lora, rows[piece.module])
            adapters[piece.module] = _rounded(adapter, dtype) if narrow else adapter
        progress("layers", len(rows), len(pieces))
    for piece, change in zip(
        whole, ordered_map(_dense, whole, compute=compute, cost=lambda p: p.cost), strict=True
    ):
        rows[piece.module] = row = _whole_row(piece, change)
        if row.norm:
            full = Full(diff=change.float().reshape(piece.shape))
            adapters[piece.module] = _rounded(full, dtype) if narrow else full
        progress("layers", len(rows), len(pieces))
    return {m: adapters[m] for m in sorted(adapters)}, tuple(rows[p.module] for p in pieces)


def is_narrow(dtype: str, *, alpha: float | None, compute: Compute) -> bool:
    """Tell whether tensors are rounded to 16 bits as they are made, and not held in fp32."""
    # Another alpha than the rank may rescale them when they are written.
    return compute.narrow and alpha is None and ITEMSIZE.get(dtype) == 2


def _rounded(adapter: Adapter, dtype: str) -> Adapter:
    """Round an adapter's tensors; what overflows stays as it is, for the writer to tell of."""
    if isinstance(adapter, Dora):
        inner = _rounded(adapter.inner, dtype)
        return replace(adapter, inner=inner, magnitude=_fitting(adapter.magnitude, dtype))
    if isinstance(adapter, Full):
        return replace(adapter, diff=_fitting(adapter.diff, dtype))
    if isinstance(adapter, Lora):
        up, down = _fitting(adapter.up, dtype), _fitting(adapter.down, dtype)
        return replace(adapter, up=up, down=down)
    return adapter


def _fitting(tensor: Tensor, dtype: str) -> Tensor:
    try:
        return cast(tensor, dtype, "a tensor")
    except NumericsError:
        return tensor


def _dense(piece: Piece) -> Tensor:
    return made(piece.truth())


def _whole_row(piece: Piece, change: Tensor) -> Row:
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    floor = piece.floor(0.0) if piece.floor else 0.0
    gone = norm <= CANCELS * floor
    return Row(
        module=piece.module,
        block=piece.block,
        rank_before=piece.rank_before,
        rank_after=None if norm and not gone else 0,
        norm=0.0 if gone else norm,
        energy=1.0,
        error=0.0,
        note="cancels out" if gone and floor else "kept whole" if norm else "",
    )


def as_dora(piece: Piece, adapter: Lora, row: Row) -> tuple[Adapter, Row]:
    """Return the DoRA nearest to the exact ΔW in the directions of a LoRA, and its error.

    The magnitude of each output is free, so the error is never above the LoRA's.
    """
    if piece.base is None:
        raise AdapterError(
            f"{piece.module} expected the weight that a DoRA is taken on, found none; name the "
            "model with --against"
        )
    base, truth = piece.base().double(), _dense(piece).double()
    change = dense(adapter.change())
    magnitude = magnitude_for(base, change, base + truth)
    found = Dora(
        inner=adapter, magnitude=magnitude.float().unsqueeze(1), role="dora_scale", axis="output"
    )
    off = float(torch.linalg.vector_norm(dense_change(found, base) - truth))
    norm = row.norm or 0.0
    error = off / norm if norm else 0.0
    return found, replace(row, error=error, energy=max(0.0, 1 - error**2))


def dense_change(adapter: Adapter, base: Tensor | None = None) -> Tensor:
    """Return ΔW as a matrix [out, in · kh · kw]."""
    change = adapter.change(base)
    return dense(change) if isinstance(change, Factors) else change


def _within_size(
    solved: Mapping[Piece, Found], rule: RankRule, itemsize: int, names: Mapping[str, int]
) -> Iterator[tuple[Piece, Found]]:
    """Spend `rule.size` over all layers at once."""
    ranks = ranks_for_size(
        {piece.module: found.worth for piece, (found, _) in solved.items()},
        {piece.module: piece.bytes_a_rank * itemsize for piece in solved},
        rule.size or 0,
        overhead={piece.module: names.get(piece.module, 0) for piece in solved},
        caps={piece.module: rule.cap(piece.conv) for piece in solved},
    )
    for piece, (found, _) in solved.items():
        yield piece, (found, ranks[piece.module])


def _adapter(piece: Piece, found: Svd, rank: int, alpha: float | None) -> Lora:
    stored = float(rank) if alpha is None else alpha
    factors = balanced(found, rank, size=math.sqrt(rank / abs(stored)))
    up, down = factors.up, factors.down.reshape(rank, *piece.shape[1:])
    if len(piece.shape) > 2:
        up = up.reshape(up.shape[0], rank, *(1 for _ in piece.shape[2:]))
    up = -up if stored < 0 else up
    return Lora(up=up, down=down, alpha=stored)


def _row(piece: Piece, spectrum: Spectrum, rank: int) -> Row:
    energy, error = kept(spectrum.svd.s, rank, energy_total=spectrum.energy)
    return Row(
        module=piece.module,
        block=piece.block,
        rank_before=piece.rank_before,
        rank_after=rank,
        norm=math.sqrt(spectrum.energy),
        energy=energy,
        error=error,
        note=spectrum.note,
        score_kept=_score(spectrum, rank - 1),
        score_cut=_score(spectrum, rank),
    )


def _score(spectrum: Spectrum, place: int) -> float | None:
    """Return a direction's score, None where there is none or it is infinite."""
    if spectrum.scores is None or not 0 <= place < len(spectrum.scores):
        return None
    score = float(spectrum.scores[place])
    return score if math.isfinite(score) else None
