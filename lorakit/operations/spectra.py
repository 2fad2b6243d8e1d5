"""The best directions of many ΔW: one by one, or on a graphics card those of one shape together."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import LorakitError
from lorakit.linalg.dense import TruncatedSvd, fixed_rank, svd_for_rule, truncated_svds
from lorakit.linalg.devices import Writer, filled, stacked
from lorakit.linalg.factored import (
    NOISE,
    Decomposition,
    Factors,
    Framed,
    Svd,
    decomposed_together,
    numerical_rank,
)
from lorakit.linalg.ranks import RankRule, choose_rank
from lorakit.linalg.single import leading_together, side_by_side
from lorakit.linalg.tiles import dense as made
from lorakit.operations.pieces import Piece

_START = "truncated SVD"
"""Names the random start of a dense layer's SVD, drawn once for all layers of one height."""
_SHARE = 4
"""The part of the byte budget, 1 / 4, that layers taken together on a card may have."""
_ON_CPU = 2**27
"""Bytes of layers taken together on a CPU, fixed: no budget changes a bit."""

_BASES, _STACK = 4 * 9, 4 * 3
"""Bytes in fp32: of nine blocks of directions, and of the matrices on their way into a stack."""
_SOLVED = 16
"""Bytes an element of a dense layer among others: ΔW, the stack, and room for the work."""
_RANK = 32
"""The width of the blocks where no rule says one."""

Truth = Factors | Framed | Tensor
Found = tuple["Spectrum", int]
"""A piece's best directions, and the rank that it would have by itself."""


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


def spectra(
    pieces: Sequence[Piece], *, rule: RankRule, compute: Compute, method: str = "auto"
) -> Iterator[tuple[Piece, Found]]:
    """Yield what each piece decomposes into and the rank that a rule gives it, as they are read.

    Args:
        pieces: of matrices.
        rule: how many directions to keep; a size keeps all that may be wanted.
        compute: device, workers, bytes in flight, and how many layers are taken together.
        method: for dense ΔW: "auto", "exact" or "fast".
    """
    groups = _groups(sorted(pieces, key=lambda piece: piece.place), rule, compute)
    results = ordered_map(
        _Solver(rule=rule, compute=compute, method=method),
        groups,
        compute=compute,
        cost=lambda group: bytes_of_group(group, rule),
    )
    for group, found in zip(groups, results, strict=True):
        yield from zip(group, found, strict=True)


def _groups(pieces: Sequence[Piece], rule: RankRule, compute: Compute) -> list[list[Piece]]:
    """Return which pieces are solved together: of one shape, within the budget."""
    groups: list[list[Piece]] = []
    open_ones: dict[object, list[Piece]] = {}
    on_cpu = compute.device == "cpu"
    room = _ON_CPU if on_cpu else compute.memory // _SHARE
    for piece in pieces:
        dense, narrow = piece.rank_before is None, _is_narrow(piece, rule)
        # In fp64 a CPU is busy with one of them.
        most = 1 if on_cpu and not dense and not narrow else compute.together
        likeness = (piece.shape, piece.rank_before, piece.rank_bound, narrow)
        group = open_ones.get(likeness)
        size = max(piece.cost, _SOLVED * _numel(piece)) if dense else piece.cost
        if group is None or len(group) >= most or (len(group) + 1) * size > room:
            group = open_ones[likeness] = []
            groups.append(group)
        group.append(piece)
    return groups


def bytes_of_group(group: Sequence[Piece], rule: RankRule) -> int:
    """Return the bytes that pieces of one shape take together: ΔW, a stack of them, and bases."""
    made, first = sum(piece.cost for piece in group), group[0]
    if first.rank_before is not None:
        return made
    sides = first.shape[0] + math.prod(first.shape[1:])
    rank = min(rule.cap(first.conv) or _RANK, first.rank_bound)
    bases = _BASES * rank * sides * len(group)
    return made + bases + (_STACK * _numel(first) if len(group) > 1 else 0)


def _is_narrow(piece: Piece, rule: RankRule) -> bool:
    """Tell whether products in fp32 may do: for a fixed rank, of factors that 16 bits hold."""
    fixed = rule.whole and rule.cap(piece.conv) is not None
    return fixed and piece.terms is not None and piece.scorer is None


def _numel(piece: Piece) -> int:
    return math.prod(piece.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solver:
    rule: RankRule
    compute: Compute
    method: str

    def __call__(self, pieces: Sequence[Piece]) -> list[Found]:
        """Decompose pieces of one shape and choose the rank of each by itself."""
        device = self.compute.torch_device
        try:
            return self._together(pieces)
        except torch.OutOfMemoryError:
            pass
        if len(pieces) > 1:
            middle = len(pieces) // 2
            return self(pieces[:middle]) + self(pieces[middle:])
        on_cpu = replace(self, compute=replace(self.compute, device="cpu"))
        note = f"too large for the memory of {device}; decomposed on the CPU"
        return [(replace(found, note=note), rank) for found, rank in on_cpu._together(pieces)]

    def _together(self, pieces: Sequence[Piece]) -> list[Found]:
        if len(pieces) == 1:
            return [self._alone(pieces[0])]
        try:
            found = self._batch(pieces)
        except LorakitError:
            # One of them is broken; alone it will be named.
            found = None
        return [self._alone(piece) for piece in pieces] if found is None else found

    def _batch(self, pieces: Sequence[Piece]) -> list[Found] | None:
        """Decompose in batches what lends itself to it: dense at one rank, or factors of one."""
        if pieces[0].rank_before is None:
            return self._dense_batch(pieces)
        found = self._in_single(pieces)
        left = [piece for piece, one in zip(pieces, found, strict=True) if one is None]
        others = iter(self._in_double(left) if left else ())
        return [next(others) if one is None else one for one in found]

    def _in_double(self, pieces: Sequence[Piece]) -> list[Found]:
        truths = [piece.truth() for piece in pieces]
        factors = [truth for truth in truths if isinstance(truth, Factors)]
        if len(factors) == len(truths) and len({one.rank for one in factors}) == 1:
            found = decomposed_together(*self._stacked(factors))
            return [
                self._cut(piece, one, self._rule(piece))
                for piece, one in zip(pieces, found, strict=True)
            ]
        return [self._chosen_of(piece, truth) for piece, truth in zip(pieces, truths, strict=True)]

    def _dense_batch(self, pieces: Sequence[Piece]) -> list[Found] | None:
        first = pieces[0]
        shape = first.shape[0], math.prod(first.shape[1:])
        rank = fixed_rank(self.rule, conv=first.conv, shape=shape)
        if rank is None or any(piece.scorer is not None for piece in pieces):
            return None
        deltas = filled([_writer(piece) for piece in pieces], shape, self.compute.torch_device)
        found = truncated_svds(deltas, rank=rank, method=self.method, seed_name=_START)
        return [
            self._of_dense(piece, one, self.rule) for piece, one in zip(pieces, found, strict=True)
        ]

    def _alone(self, piece: Piece) -> Found:
        try:
            return self._in_single([piece])[0] or self._chosen_of(piece, piece.truth())
        except LorakitError as error:
            raise type(error)(f"{piece.module} {error}") from error

    def _in_single(self, pieces: Sequence[Piece]) -> list[Found | None]:
        """Decompose in fp32, for a fixed rank, sums of factors that are stored in 16 bits."""
        rank = self.rule.cap(pieces[0].conv)
        sums = [p.terms for p in pieces if p.terms is not None and _is_narrow(p, self.rule)]
        alike = len({sum(len(term.down) for term in terms) for terms in sums}) == 1
        if rank is None or len(sums) < len(pieces) or not alike:
            return [None] * len(pieces)
        ups, downs = side_by_side(sums, self.compute.torch_device)
        return [
            None if one is None else self._of_dense(piece, one, self.rule)
            for piece, one in zip(pieces, leading_together(ups, downs, rank), strict=True)
        ]

    def _rule(self, piece: Piece) -> RankRule:
        return RankRule(rank=piece.rank_bound) if self.rule.exact and piece.capped else self.rule

    def _chosen_of(self, piece: Piece, truth: Truth) -> Found:
        device, rule = self.compute.torch_device, self._rule(piece)
        if isinstance(truth, Framed):
            return self._cut(piece, truth.decomposed(), rule)
        if isinstance(truth, Factors):
            (factored,) = decomposed_together(*self._stacked([truth]))
            return self._cut(piece, factored, rule)
        found = svd_for_rule(
            stacked([truth], device)[0],
            rule,
            conv=piece.conv,
            method=self.method,
            seed_name=_START,
            scorer=piece.scorer,
        )
        return self._of_dense(piece, found, rule)

    def _stacked(self, parts: Sequence[Factors]) -> tuple[Tensor, Tensor]:
        """Return factors of one shape as [b, m, r] and [b, r, n] on the device."""
        device = self.compute.torch_device
        ups = stacked([part.up for part in parts], device)
        return ups, stacked([part.down for part in parts], device)

    def _of_dense(self, piece: Piece, found: TruncatedSvd, rule: RankRule) -> Found:
        first = partial(_first, Svd(u=found.u, s=found.s, v=found.v))
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


def _writer(piece: Piece) -> Writer:
    def write(room: Tensor) -> None:
        room.copy_(made(piece.truth()))

    return piece.write or write


def _first(found: Svd, rank: int) -> Svd:
    return Svd(u=found.u[:, :rank], s=found.s[:rank], v=found.v[:, :rank])


def _picked(found: Svd, order: Tensor) -> Svd:
    """Return some of the directions, in an order; all of them as they are where it is theirs."""
    if torch.equal(order, torch.arange(len(found.s))):
        return found
    there = order.to(found.u.device)
    return Svd(u=found.u[:, there], s=found.s[order], v=found.v[:, there])


def _host(found: Svd) -> Svd:
    return Svd(u=found.u.float().cpu(), s=found.s.cpu(), v=found.v.float().cpu())


def all_directions(piece: Piece, *, compute: Compute) -> Svd:
    """Return what a score chooses from: all directions of factors, the leading ones of a matrix."""
    # A budget is spent over all layers at once, so each gives all of its directions.
    solve = _Solver(rule=RankRule(size=1), compute=compute, method="auto")
    ((found, _),) = solve([replace(piece, scorer=None)])
    return found.svd
