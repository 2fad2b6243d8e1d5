"""From the exact ΔW of many modules to a LoRA of the rank that a rule asks for."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Dora, Full, Lora, magnitude_for
from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, LorakitError
from lorakit.linalg.dense import svd_for_rule
from lorakit.linalg.factored import (
    NOISE,
    Decomposition,
    Factors,
    Framed,
    Svd,
    balanced,
    decomposed,
    dense,
    numerical_rank,
)
from lorakit.linalg.ranks import RankRule, Scorer, choose_rank, kept, ranks_for_size
from lorakit.linalg.tiles import dense as made
from lorakit.progress import Progress, silent
from lorakit.report import Row

CANCELS = 1e-6
"""What is left of vectors that cancel, relative: the rounding of fp32 sums."""
KEY_OVERHEAD = 3 * 200
"""Bytes that a kept module's three entries take in the header, names included, at the most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One module's exact ΔW, made when it is asked for.

    Args:
        module: the canonical name.
        block: its block id.
        shape: of ΔW: (out, in), (out, in, kh, kw), or (out,) for a bias or a norm.
        truth: makes ΔW as factors, or dense [out, in · kh · kw].
        base: reads the weight that ΔW changes, where the output's kind needs it.
        rank_before: the largest rank among the inputs, None where ΔW is dense.
        rank_bound: no ΔW here has a larger rank, or none is kept where `capped`.
        capped: whether a dense method made the ΔW of factors: without a rank rule it is cut to the
            sum of their ranks.
        floor: ‖·‖ of the largest part that was summed; what cancels below its rounding is noise.
            Where that is below the number that it is given, a bound below that number will do.
        cost: bytes that one evaluation takes at once.
        scorer: what the singular values are measured by, where a rule or a budget asks for that.
    """

    module: str
    block: str
    shape: tuple[int, ...]
    truth: Callable[[], Factors | Framed | Tensor]
    base: Callable[[], Tensor] | None = None
    rank_before: int | None = None
    rank_bound: int
    capped: bool = False
    floor: Callable[[float], float] | None = None
    cost: int = 0
    scorer: Scorer | None = None

    @property
    def conv(self) -> bool:
        """Whether the kernel is larger than 1x1."""
        return math.prod(self.shape[2:]) > 1

    @property
    def vector(self) -> bool:
        """Whether it is a bias or a norm, which has no rank."""
        return len(self.shape) == 1

    @property
    def bytes_a_rank(self) -> int:
        """Elements of one direction: out + in · kh · kw."""
        return self.shape[0] + math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """A piece's best directions, and what is known of the rest.

    Args:
        svd: the largest first; where there are scores, the best first.
        energy: Σσ² of the whole piece.
        note: what the reader should know.
        scores: of all directions that were there to choose from, falling.
    """

    svd: Svd
    energy: float
    note: str = ""
    scores: Tensor | None = None

    @property
    def worth(self) -> Tensor:
        """What a budget ranks directions by: σ, or σ / reference where there is a score."""
        return self.svd.s if self.scores is None else 10.0**self.scores


def truncate(
    pieces: Sequence[Piece],
    *,
    rule: RankRule,
    compute: Compute,
    alpha: float | None = None,
    itemsize: int = 2,
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
        itemsize: bytes of a stored number, for `rule.size`.
        method: for dense ΔW: "auto", "exact" or "fast".
        kind: "lora", "dora", or "full" for ΔW itself.
        names: module -> bytes that it costs besides its directions, for `rule.size`.
        progress: called with (what, done, total).

    Returns:
        The adapters of the modules that keep at least one direction, and a row a piece.
    """
    cut = _local if rule.size is None else _global
    whole = [piece for piece in pieces if piece.vector or kind == "full"]
    ranked = [piece for piece in pieces if not piece.vector and kind != "full"]
    adapters: dict[str, Adapter] = {}
    rows: dict[str, Row] = {}
    solve = _Solver(rule=rule, compute=compute, method=method)
    price = _Price(itemsize=itemsize, names=names or {})
    for piece, spectrum, rank in cut(ranked, solve, price):
        rows[piece.module] = _row(piece, spectrum, rank)
        if rank:
            adapter = _adapter(piece, spectrum.svd, rank, alpha)
            adapters[piece.module] = adapter
            if kind == "dora":
                adapters[piece.module], rows[piece.module] = as_dora(
                    piece, adapter, rows[piece.module]
                )
        progress("layers", len(rows), len(pieces))
    for piece, change in zip(
        whole, ordered_map(_dense, whole, compute=compute, cost=lambda p: p.cost), strict=True
    ):
        rows[piece.module] = row = _whole_row(piece, change)
        if row.norm:
            adapters[piece.module] = Full(diff=change.float().reshape(piece.shape))
        progress("layers", len(rows), len(pieces))
    return {m: adapters[m] for m in sorted(adapters)}, tuple(rows[p.module] for p in pieces)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solver:
    rule: RankRule
    compute: Compute
    method: str

    def __call__(self, piece: Piece) -> tuple[Spectrum, int]:
        """Decompose one piece and choose its rank by itself; keep no more than the cap."""
        try:
            return self._solve(piece)
        except LorakitError as error:
            raise type(error)(f"{piece.module} {error}") from error

    def _solve(self, piece: Piece) -> tuple[Spectrum, int]:
        device = self.compute.torch_device
        truth = piece.truth()
        rule = self.rule
        if rule.exact and piece.capped:
            rule = RankRule(rank=piece.rank_bound)
        if isinstance(truth, Framed):
            return self._cut(piece, truth.decomposed(), rule)
        if isinstance(truth, Factors):
            factors = Factors(up=truth.up.to(device), down=truth.down.to(device))
            return self._cut(piece, decomposed(factors), rule)
        found = svd_for_rule(
            truth.to(device),
            rule,
            conv=piece.conv,
            method=self.method,
            seed_name=piece.module,
            scorer=piece.scorer,
        )
        whole = Svd(u=found.u, s=found.s, v=found.v)
        first = partial(_first, whole)
        return self._chosen(piece, found.s, found.energy_total, first, rule, found.note)

    def _cut(self, piece: Piece, found: Decomposition, rule: RankRule) -> tuple[Spectrum, int]:
        """Choose the rank by the singular values, and make only the directions that are kept."""
        shape = piece.shape[0], math.prod(piece.shape[1:])
        least = float(found.s[-1]) if len(found.s) else 0.0
        floor = piece.floor(least / NOISE) if piece.floor else None
        limit = numerical_rank(found.s, shape, reference=floor)
        s = found.s[:limit]
        note = "" if limit else "cancels out"
        first = partial(found.first, dtype=torch.float32)
        return self._chosen(piece, s, float((s**2).sum()), first, rule, note)

    def _chosen(
        self,
        piece: Piece,
        s: Tensor,
        energy: float,
        first: Callable[[int], Svd],
        rule: RankRule,
        note: str,
    ) -> tuple[Spectrum, int]:
        """Choose the directions: the leading ones, or those of the best scores."""
        scores, order = None, torch.arange(len(s))
        if piece.scorer is not None:
            scores = piece.scorer.scores(s, energy)
            order = scores.argsort(descending=True, stable=True)
            scores = scores[order]
        rank = choose_rank(s, rule, conv=piece.conv, energy_total=energy, scores=scores)
        order = order[: rank if self.rule.size is None else len(s)]
        directions = _picked(first(int(order.max()) + 1 if len(order) else 0), order)
        return Spectrum(svd=_host(directions), energy=energy, note=note, scores=scores), rank


def _first(found: Svd, rank: int) -> Svd:
    return Svd(u=found.u[:, :rank], s=found.s[:rank], v=found.v[:, :rank])


def _picked(found: Svd, order: Tensor) -> Svd:
    """Return some of the directions, in an order; all of them as they are where it is theirs."""
    if torch.equal(order, torch.arange(len(found.s))):
        return found
    order = order.to(found.s.device)
    return Svd(u=found.u[:, order], s=found.s[order], v=found.v[:, order])


def _host(found: Svd) -> Svd:
    return Svd(u=found.u.float().cpu(), s=found.s.cpu(), v=found.v.float().cpu())


def all_directions(piece: Piece, *, compute: Compute) -> Svd:
    """Return what a score chooses from: all directions of factors, the leading ones of a matrix."""
    # A budget is spent over all layers at once, so each gives all of its directions.
    solve = _Solver(rule=RankRule(size=1), compute=compute, method="auto")
    return solve(replace(piece, scorer=None))[0].svd


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Price:
    """What a number costs in bytes, and what each module costs besides."""

    itemsize: int
    names: Mapping[str, int]


def _local(
    pieces: Sequence[Piece], solve: _Solver, price: _Price
) -> Iterator[tuple[Piece, Spectrum, int]]:
    del price
    solved = ordered_map(solve, pieces, compute=solve.compute, cost=lambda piece: piece.cost)
    for piece, (spectrum, rank) in zip(pieces, solved, strict=True):
        yield piece, spectrum, rank


def _global(
    pieces: Sequence[Piece], solve: _Solver, price: _Price
) -> Iterator[tuple[Piece, Spectrum, int]]:
    solved = [
        spectrum
        for spectrum, _ in ordered_map(
            solve, pieces, compute=solve.compute, cost=lambda piece: piece.cost
        )
    ]
    ranks = ranks_for_size(
        {p.module: s.worth for p, s in zip(pieces, solved, strict=True)},
        {piece.module: piece.bytes_a_rank * price.itemsize for piece in pieces},
        solve.rule.size or 0,
        overhead={piece.module: price.names.get(piece.module, 0) for piece in pieces},
        caps={piece.module: solve.rule.cap(piece.conv) for piece in pieces},
    )
    for piece, spectrum in zip(pieces, solved, strict=True):
        yield piece, spectrum, ranks[piece.module]


def _adapter(piece: Piece, found: Svd, rank: int, alpha: float | None) -> Lora:
    factors = balanced(found, rank)
    up, down = factors.up.float(), factors.down.float().reshape(rank, *piece.shape[1:])
    if len(piece.shape) > 2:
        up = up.reshape(up.shape[0], rank, *(1 for _ in piece.shape[2:]))
    stored = float(rank) if alpha is None else alpha
    if stored != rank:
        factor = math.sqrt(rank / abs(stored))
        up, down = up * math.copysign(factor, stored), down * factor
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
