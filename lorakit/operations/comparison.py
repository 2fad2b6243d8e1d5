"""What a comparison found: norms, angles, shared directions, conflicts, by block and in total."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
TOTAL = "all"
Matrix = tuple[tuple[float, ...], ...]
_EQUAL = 1e-24
"""Squared distances below this share of the squares are the rounding of fp64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One layer, one block, or all of them together.

    Args:
        block: its id, or `TOTAL`.
        layers: how many there are.
        gram: [T, T], the inner products of what is compared.
        apart: [T, T], the squared distances.
        overlap: [T, T], the share of one's directions that lies in the other's, of LoRAs.
        chance: [T, T], what `overlap` is of unrelated LoRAs of these ranks.
        best: [T, T], the most of one's Σσ² that the other's rank can hold.
        conflict: [T, T], the share of the elements whose signs disagree, perhaps of a sample.
        weighted_conflict: [T, T], the same with each element counted by the product of both.
        energy: what a rank rule keeps of the sum, where one was given.
        module: which layer it is, where it is one.
    """

    block: str
    layers: int
    gram: Matrix
    apart: Matrix
    overlap: Matrix = ()
    chance: Matrix = ()
    best: Matrix = ()
    conflict: Matrix = ()
    weighted_conflict: Matrix = ()
    energy: float | None = None
    module: str = ""

    @property
    def norms(self) -> tuple[float, ...]:
        """The norm of each."""
        return tuple(math.sqrt(max(row[i], 0.0)) for i, row in enumerate(self.gram))

    @property
    def cosines(self) -> Matrix:
        """The cosine of each pair, 0 where one is zero."""
        norms = self.norms
        return tuple(
            tuple(
                1.0
                if i == j
                else max(-1.0, min(1.0, product / (norms[i] * norms[j])))
                if norms[i] * norms[j] > 0
                else 0.0
                for j, product in enumerate(row)
            )
            for i, row in enumerate(self.gram)
        )

    @property
    def distances(self) -> Matrix:
        """‖one − other‖ / ‖one‖; 0 where both are zero, infinite where only the first is."""
        return tuple(
            tuple(self._distance(i, j) for j in range(len(self.gram)))
            for i in range(len(self.gram))
        )

    def _distance(self, i: int, j: int) -> float:
        own, other, square = self.gram[i][i], self.gram[j][j], self.apart[i][j]
        if square <= _EQUAL * (own + other):
            return 0.0
        return math.sqrt(square / own) if own > 0.0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite distance is None."""
        distances = [[d if math.isfinite(d) else None for d in row] for row in self.distances]
        body = asdict(self)
        del body["gram"], body["apart"], body["best"]
        if not self.module:
            del body["module"]
        return body | {"norms": self.norms, "cosines": self.cosines, "distances": distances}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a block of a mixture is made of: shares by name, and what is left, relative."""

    shares: Mapping[str, float]
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One as a weighted sum of the others.

    Args:
        name: which one.
        shares: name -> strength of a LoRA, or weight of a model; weights of models sum to 1.
        residual: what the sum leaves, relative: to the norm of a LoRA, of models to their distance.
        even: whether the shares are the same in all blocks; else those of `blocks` leave that much.
        rounding: the residual that the rounding of what is stored makes, 0 where it is not known.
        blocks: the same in each block.
    """

    name: str
    shares: Mapping[str, float]
    residual: float
    even: bool
    rounding: float
    blocks: Mapping[str, Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One LoRA as what is left of another.

    Args:
        name: which one.
        source: of which it is made.
        strengths: by block, 0 where nothing is left.
        kept: the share of the source's Σ‖ΔW‖² that is left, at a strength of 1.
        residual: what the source at these strengths does not explain, relative; None where the
            rank was cut.
    """

    name: str
    source: str
    strengths: Mapping[str, float]
    kept: float
    residual: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How several LoRAs, or models, lie to each other.

    Args:
        kind: "loras"; "models" of two; "changes" of more, against the first of them.
        names: what is compared, in order.
        blocks: a row a block.
        total: all together.
        rows: a row a layer.
        only_in: name -> the layers that not all of them have.
        advice: one plain sentence.
        notes: what else is to be said.
        base: what "changes" are from.
        mixture: which one is a weighted sum of the others.
        cut: which LoRA is what was left of another.
    """

    kind: str
    names: tuple[str, ...]
    blocks: tuple[Compared, ...]
    total: Compared
    rows: tuple[Compared, ...] = ()
    only_in: Mapping[str, int] = field(default_factory=dict)
    advice: str = ""
    notes: tuple[str, ...] = ()
    base: str | None = None
    mixture: Mixture | None = None
    cut: Cut | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values; `schema` tells the layout's version."""
        return {
            "schema": SCHEMA,
            "command": "compare",
            "kind": self.kind,
            "names": self.names,
            "total": self.total.as_dict(),
            "blocks": [block.as_dict() for block in self.blocks],
            "rows": [row.as_dict() for row in self.rows],
            "only_in": dict(self.only_in),
            "advice": self.advice,
            "notes": self.notes,
            "base": self.base,
            "mixture": self.mixture and asdict(self.mixture),
            "cut": self.cut and asdict(self.cut),
        }
