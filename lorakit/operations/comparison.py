"""What a comparison found: norms, angles, shared directions, conflicts, by block and in total."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
TOTAL = "all"
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One block, or all of them together.

    Args:
        block: its id, or `TOTAL`.
        layers: how many there are.
        gram: [T, T], the inner products of what is compared.
        overlap: [T, T], the share of one's directions that lies in the other's, of LoRAs.
        chance: [T, T], what `overlap` is of unrelated LoRAs of these ranks.
        conflict: [T, T], the share of the elements whose signs disagree, of a sample.
        energy: what a rank rule keeps of the sum, where one was given.
    """

    block: str
    layers: int
    gram: Matrix
    overlap: Matrix = ()
    chance: Matrix = ()
    conflict: Matrix = ()
    energy: float | None = None

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
        if i == j:
            return 0.0
        own, other, product = self.gram[i][i], self.gram[j][j], self.gram[i][j]
        square = max(own + other - 2 * product, 0.0)
        if own <= 0.0:
            return math.inf if square else 0.0
        return math.sqrt(square / own)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite distance is None."""
        distances = [[d if math.isfinite(d) else None for d in row] for row in self.distances]
        body = asdict(self)
        del body["gram"]
        return body | {"norms": self.norms, "cosines": self.cosines, "distances": distances}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How several LoRAs, or models, lie to each other.

    Args:
        kind: "loras"; "models" of two; "changes" of more, against the first of them.
        names: what is compared, in order.
        blocks: a row a block.
        total: all together.
        only_in: name -> the layers that not all of them have.
        advice: one plain sentence.
        notes: what else is to be said.
    """

    kind: str
    names: tuple[str, ...]
    blocks: tuple[Compared, ...]
    total: Compared
    only_in: Mapping[str, int] = field(default_factory=dict)
    advice: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values; `schema` tells the layout's version."""
        return {
            "schema": SCHEMA,
            "command": "compare",
            "kind": self.kind,
            "names": self.names,
            "total": self.total.as_dict(),
            "blocks": [block.as_dict() for block in self.blocks],
            "only_in": dict(self.only_in),
            "advice": self.advice,
            "notes": self.notes,
        }
