"""What an operation did: a row a module, totals, and the same as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One module: its ΔW before, and what of it the output holds.

    `norm` is ‖ΔW‖ (Frobenius), `energy` the share of Σσ² kept, `error` ‖ΔW − kept‖ / ‖ΔW‖. Where
    directions have scores, `score_kept` is that of the last one kept, `score_cut` of the first one
    cut; None where there is none, or where it is infinite.
    """

    module: str
    block: str
    rank_before: int | None = None
    rank_after: int | None = None
    norm: float | None = None
    energy: float | None = None
    error: float | None = None
    note: str = ""
    score_kept: float | None = None
    score_cut: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What reading the output back showed.

    `largest` and `mean` are relative errors of ΔW over the layers, the rank rule's cut included;
    `rounding` is the largest part that the rank rule does not explain, `tolerance` its bound.
    """

    layers: int
    largest: float
    mean: float
    worst: str
    rounding: float
    tolerance: float
    untouched: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a command would do: nothing was read but headers, nothing was written.

    `output_bytes` and `peak_bytes` are upper bounds.
    """

    layers: int
    output_bytes: int
    peak_bytes: int
    device: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What directions were ranked by: log10 of σ / reference.

    `score` names the reference, `against` the model that it was taken of; ΔW was multiplied by
    `rescale` first. `lowest_kept` and `highest_cut` are over all layers; where bytes decided, a
    smaller direction may be kept above the score of a larger one that is cut.
    """

    score: str
    against: str | None
    rescale: float
    threshold: float | None
    lowest_kept: float | None = None
    highest_cut: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A row a module, what had no place, and remarks that the user should read."""

    command: str
    rows: tuple[Row, ...] = ()
    unmatched: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    lost: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    output: str | None = None
    output_bytes: int | None = None
    verified: Verified | None = None
    plan: Plan | None = None
    analysis: Mapping[str, Any] | None = None
    scoring: Scoring | None = None

    @property
    def norm(self) -> float | None:
        """‖ΔW‖ over all modules together."""
        norms = [row.norm for row in self.rows if row.norm is not None]
        return math.hypot(*norms) if norms else None

    @property
    def error(self) -> float | None:
        """The relative error over all modules together."""
        rows = [row for row in self.rows if row.norm is not None and row.error is not None]
        norm = math.hypot(*(row.norm or 0.0 for row in rows)) if rows else 0.0
        if norm == 0.0:
            return None
        return math.hypot(*((row.norm or 0.0) * (row.error or 0.0) for row in rows)) / norm

    @property
    def energy(self) -> float | None:
        """The share of Σσ² kept over all modules together."""
        rows = [row for row in self.rows if row.norm is not None and row.energy is not None]
        total = math.fsum((row.norm or 0.0) ** 2 for row in rows)
        if total == 0.0:
            return None
        return math.fsum((row.norm or 0.0) ** 2 * (row.energy or 0.0) for row in rows) / total

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values; `schema` tells the layout's version."""
        body = {key: value for key, value in asdict(self).items() if key != "command"}
        totals = {
            "layers": len(self.rows),
            "norm": self.norm,
            "energy": self.energy,
            "error": self.error,
            "rank_before": _largest(row.rank_before for row in self.rows),
            "rank_after": _largest(row.rank_after for row in self.rows),
        }
        return {"schema": SCHEMA, "command": self.command, "totals": totals, **body}


def _largest(ranks: Any) -> int | None:
    return max((rank for rank in ranks if rank is not None), default=None)


def name_some(names: Any, *, limit: int = 5) -> str:
    """Name the first five and count the rest: 'a, b and 3 more'."""
    listed = list(names)
    shown = ", ".join(str(name) for name in listed[:limit])
    more = len(listed) - limit
    return f"{shown} and {more} more" if more > 0 else shown
