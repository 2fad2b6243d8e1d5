"""From the exact ΔW of many modules to a LoRA of the rank that a rule asks for."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lorakit.adapters import Adapter, Lora
from lorakit.compute import Compute, ordered_map
from lorakit.errors import LorakitError
from lorakit.linalg.dense import svd_for_rule
from lorakit.linalg.factored import Factors, Svd, balanced, numerical_rank, svd
from lorakit.linalg.ranks import RankRule, choose_rank, kept, ranks_for_size
from lorakit.progress import Progress, silent
from lorakit.report import Row

KEY_OVERHEAD = 3 * 200
"""Bytes that a kept module's three entries take in the header, names included, at the most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One module's exact ΔW, made when it is asked for.

    Args:
        module: the canonical name.
        block: its block id.
        shape: of ΔW: (out, in) or (out, in, kh, kw).
        truth: makes ΔW as factors, or dense [out, in · kh · kw] in fp32.
        rank_before: the largest rank among the inputs, None where ΔW is dense.
        rank_bound: no ΔW here has a larger rank.
        floor: ‖·‖ of the largest part that was summed; what cancels below its rounding is noise.
        cost: bytes that one evaluation takes at once.
    """

    module: str
    block: str
    shape: tuple[int, ...]
    truth: Callable[[], Factors | Tensor]
    rank_before: int | None = None
    rank_bound: int
    floor: Callable[[], float] | None = None
    cost: int = 0

    @property
    def conv(self) -> bool:
        """Whether the kernel is larger than 1x1."""
        return math.prod(self.shape[2:]) > 1

    @property
    def bytes_a_rank(self) -> int:
        """Elements of one direction: out + in · kh · kw."""
        return self.shape[0] + math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """A piece's leading directions, and what is known of the rest."""

    svd: Svd
    energy: float
    note: str = ""


def truncate(
    pieces: Sequence[Piece],
    *,
    rule: RankRule,
    compute: Compute,
    alpha: float | None = None,
    itemsize: int = 2,
    method: str = "auto",
    progress: Progress = silent,
    what: str = "layers",
) -> tuple[dict[str, Adapter], tuple[Row, ...]]:
    """Cut each ΔW to the rank that `rule` gives it, optimally, and balance the factors.

    Args:
        pieces: one a module, in the order of the rows that come back.
        rule: how many directions to keep; `rule.exact` keeps the numerical rank.
        compute: device, workers, bytes in flight.
        alpha: what to store as alpha, ΔW unchanged; None for the rank.
        itemsize: bytes of a stored number, for `rule.size`.
        method: for dense ΔW: "auto", "exact" or "fast".

    Returns:
        The adapters of the modules that keep at least one direction, and a row a piece.
    """
    cut = _local if rule.size is None else _global
    adapters: dict[str, Adapter] = {}
    rows = []
    solve = _Solver(rule=rule, compute=compute, method=method)
    total = len(pieces)
    for done, (piece, spectrum, rank) in enumerate(cut(pieces, solve, itemsize), start=1):
        if rank:
            adapters[piece.module] = _adapter(piece, spectrum.svd, rank, alpha)
        rows.append(_row(piece, spectrum, rank))
        progress(what, done, total)
    return adapters, tuple(rows)


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
        if isinstance(truth, Factors):
            factors = Factors(up=truth.up.to(device), down=truth.down.to(device))
            found = svd(factors)
            floor = piece.floor() if piece.floor else None
            limit = numerical_rank(found.s, (len(found.u), len(found.v)), reference=floor)
            energy = float((found.s[:limit] ** 2).sum())
            note = "" if limit else "cancels out"
            spectrum = Spectrum(svd=_first(found, limit), energy=energy, note=note)
        else:
            dense = svd_for_rule(
                truth.to(device),
                self.rule,
                conv=piece.conv,
                method=self.method,
                seed_name=piece.module,
            )
            found = Svd(u=dense.u, s=dense.s, v=dense.v)
            spectrum = Spectrum(svd=found, energy=dense.energy_total, note=dense.note)
        rank = choose_rank(spectrum.svd.s, self.rule, conv=piece.conv, energy_total=spectrum.energy)
        keep = rank if self.rule.size is None else len(spectrum.svd.s)
        return replace(spectrum, svd=_host(_first(spectrum.svd, keep))), rank


def _first(found: Svd, rank: int) -> Svd:
    return Svd(u=found.u[:, :rank], s=found.s[:rank], v=found.v[:, :rank])


def _host(found: Svd) -> Svd:
    return Svd(u=found.u.float().cpu(), s=found.s.cpu(), v=found.v.float().cpu())


def _local(
    pieces: Sequence[Piece], solve: _Solver, itemsize: int
) -> Iterator[tuple[Piece, Spectrum, int]]:
    del itemsize
    solved = ordered_map(solve, pieces, compute=solve.compute, cost=lambda piece: piece.cost)
    for piece, (spectrum, rank) in zip(pieces, solved, strict=True):
        yield piece, spectrum, rank


def _global(
    pieces: Sequence[Piece], solve: _Solver, itemsize: int
) -> Iterator[tuple[Piece, Spectrum, int]]:
    solved = [
        spectrum
        for spectrum, _ in ordered_map(
            solve, pieces, compute=solve.compute, cost=lambda piece: piece.cost
        )
    ]
    ranks = ranks_for_size(
        {p.module: s.svd.s for p, s in zip(pieces, solved, strict=True)},
        {piece.module: piece.bytes_a_rank * itemsize for piece in pieces},
        solve.rule.size or 0,
        overhead={piece.module: KEY_OVERHEAD for piece in pieces},
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
    )
