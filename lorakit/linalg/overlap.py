"""How several ΔW of one layer lie to each other: angles, distances, shared directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

import torch
from torch import Tensor

from lorakit.linalg.factored import (
    Factors,
    core_svd,
    decomposed,
    join,
    norm,
    numerical_rank,
    scaled,
)
from lorakit.linalg.sides import reduced

_CANCELLED = 1e-8
"""Below this share of their squares, the distance of two ΔW is measured by itself."""
_NOTHING = 1e-14
"""Below this share of the largest a singular value is no direction, in fp64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Angles:
    """What T matrices of one shape have to do with each other, [T, T] each, in fp64.

    Args:
        gram: the inner products.
        apart: the squared distances, right also where two are all but equal.
        overlap: the share of the directions of the one of smaller rank that the other holds.
        chance: what `overlap` is on average where the directions are random.
        best: the most of ‖·‖² of the first that a matrix of the second's rank can hold.
    """

    gram: Tensor
    apart: Tensor
    overlap: Tensor
    chance: Tensor
    best: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Columns:
    """The inner products of the columns of all `up`, and of the rows of all `down`.

    Args:
        left: [R, R] in fp64, R the sum of the ranks.
        right: likewise.
        spans: which columns are whose.
    """

    left: Tensor
    right: Tensor
    spans: tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Turns:
    """Turns the columns of `up`, and the rows of `down`, into singular directions: [r, k] each.

    `s` are the singular values, [k].
    """

    left: Tensor
    right: Tensor
    s: Tensor


def angles(parts: Sequence[Factors], *, device: torch.device | None = None) -> Angles:
    """Return how products of one shape lie to each other, from two Gram matrices of all columns.

    Overlap is the mean squared cosine of the principal angles between the column spaces, and that
    between the row spaces, over the smaller rank, and the mean of both: ‖U₁ᵀU₂‖² / min(r₁, r₂). It
    is 1 where the directions of one lie among the other's, 0 where they are orthogonal, and of
    random directions max(r₁, r₂) / d. Only directions that are no rounding count.

    Args:
        parts: factors of [m, n] each; of rank 0 what is zero.
        device: where the large products are made.

    Source: Björck and Golub 1973, for the angles.

    Cost: O((m + n) R² + R³).
    """
    columns = _columns(parts, device)
    known = [_turns(part, columns, span) for part, span in zip(parts, columns.spans, strict=True)]
    if None in known:
        # Columns that depend on each other have no Cholesky factor; singular directions do not.
        found = [
            _independent(part) if turns is None else (part, turns)
            for part, turns in zip(parts, known, strict=True)
        ]
        parts, known = [part for part, _ in found], [turns for _, turns in found]
        columns = _columns(parts, device)
    gram = _gram(columns)
    turned = [turns for turns in known if turns is not None]
    shared, chance = _overlaps(columns, turned, parts[0].shape)
    return Angles(
        gram=gram, apart=_apart(parts, gram), overlap=shared, chance=chance, best=_best(turned)
    )


def _columns(parts: Sequence[Factors], device: torch.device | None) -> _Columns:
    whole = join(parts)
    # MPS has no fp64.
    place = torch.device("cpu") if device is None or device.type == "mps" else device
    up, down = (side.to(place).double() for side in (whole.up, whole.down))
    ends = accumulate(part.rank for part in parts)
    spans = tuple(slice(end - p.rank, end) for end, p in zip(ends, parts, strict=True))
    return _Columns(left=(up.T @ up).cpu(), right=(down @ down.T).cpu(), spans=spans)


def _turns(part: Factors, columns: _Columns, span: slice) -> _Turns | None:
    """Return what makes singular directions of the columns; None where they are dependent."""
    if not part.rank:
        none = columns.left.new_zeros(0, 0)
        return _Turns(left=none, right=none, s=none.flatten())
    left = reduced(part.up.double(), columns.left[span, span])
    right = reduced(part.down.double().T, columns.right[span, span])
    if left.turn is None or right.turn is None:
        return None
    u, s, v = core_svd((left.core * (left.lengths * right.lengths)) @ right.core.T)
    rank = numerical_rank(s, part.shape)
    return _Turns(left=left.turn @ u[:, :rank], right=right.turn @ v[:, :rank], s=s[:rank])


def _independent(part: Factors) -> tuple[Factors, _Turns]:
    """Return the same product by its singular directions, in fp64, and what turns these."""
    found = decomposed(Factors(up=part.up.double(), down=part.down.double()))
    kept = found.first(int((found.s > _NOTHING * found.s.max()).sum()))
    rank = numerical_rank(kept.s, part.shape)
    one = torch.eye(len(kept.s), dtype=torch.float64)
    turns = _Turns(left=(one / kept.s)[:, :rank], right=one[:, :rank], s=kept.s[:rank])
    return Factors(up=kept.u * kept.s, down=kept.v.T), turns


def _gram(columns: _Columns) -> Tensor:
    products = columns.left * columns.right
    sums = [[products[i, j].sum() for j in columns.spans] for i in columns.spans]
    found = torch.stack([torch.stack(row) for row in sums])
    return (found + found.T) / 2


def _apart(parts: Sequence[Factors], gram: Tensor) -> Tensor:
    squares = gram.diagonal()
    whole = squares + squares[:, None]
    found = (whole - 2 * gram).clamp(min=0).fill_diagonal_(0.0)
    for i, j in combinations(range(len(parts)), 2):
        if 0.0 < float(whole[i, j]) * _CANCELLED > float(found[i, j]):
            wide = [Factors(up=p.up.double(), down=p.down.double()) for p in (parts[i], parts[j])]
            found[i, j] = found[j, i] = norm(join([wide[0], scaled(wide[1], -1.0)])) ** 2
    return found


def _overlaps(
    columns: _Columns, turns: Sequence[_Turns], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    ranks = [len(one.s) for one in turns]
    live = torch.tensor([float(rank > 0) for rank in ranks], dtype=torch.float64)
    shared, chance = live.diag(), torch.zeros(len(turns), len(turns), dtype=torch.float64)
    for i, j in combinations(range(len(turns)), 2):
        if not ranks[i] or not ranks[j]:
            continue
        at = columns.spans[i], columns.spans[j]
        sides = (
            (turns[i].left, turns[j].left, columns.left),
            (turns[i].right, turns[j].right, columns.right),
        )
        squares = [float((a.T @ products[at] @ b).square().sum()) for a, b, products in sides]
        shared[i, j] = shared[j, i] = min(1.0, sum(squares) / (2 * min(ranks[i], ranks[j])))
    most = torch.tensor([[max(a, b) * min(a, b, 1) for b in ranks] for a in ranks])
    for side in shape:
        chance += (most.double() / side).clamp(max=1.0) / 2
    return shared, chance


def _best(turns: Sequence[_Turns]) -> Tensor:
    """Return Σσ² of each over the leading directions, as many as each other has.

    Source: Eckart and Young 1936.
    """
    squares = [one.s.double().square() for one in turns]
    sums = [[own[: len(other)].sum() for other in squares] for own in squares]
    return torch.stack([torch.stack(row) for row in sums])
