"""What a map of an inspection can show: share, norm, effective rank, size beside the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.operations.inspection import Group, Inspection

TEXT_ENCODERS = "text_encoder"
_DIGITS = 3
_MOST_DECIMALS = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measure:
    """A number that every group of layers has.

    Args:
        title: what it is, with its unit.
        short: the same in a narrow column.
        value: takes it from a group, None where it was not measured.
        unit: 100 for per cent.
        decimals: always so many; None for three digits of the largest.
        squared: it grows with the square of the change, so that its colours go by the root.
    """

    title: str
    short: str
    value: "Callable[[Group], float | None]"
    unit: float = 1.0
    decimals: int | None = None
    squared: bool = False


SHARE = Measure(
    title="share of the change, %",
    short="all",
    value=lambda group: group.share,
    unit=100.0,
    decimals=1,
    squared=True,
)
NORM = Measure(title="norm of the change", short="norm", value=lambda group: group.norm)
RANK = Measure(
    title="effective rank", short="rank", value=lambda group: group.effective_rank, decimals=1
)
RELATIVE = Measure(
    title="change relative to the model, %",
    short="of W, %",
    value=lambda group: group.relative,
    unit=100.0,
)
MEASURES = (SHARE, NORM, RANK, RELATIVE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scale:
    """How one measure is written and coloured, the same way in all cells of all files."""

    measure: Measure
    most: float
    decimals: int

    @classmethod
    def of(cls, measure: Measure, found: "Sequence[Inspection]") -> "Scale":
        """Take the largest number of a cell as the end of the scale."""
        cells = (g for one in found for groups in one.cells.values() for g in groups)
        most = max((measure.value(group) or 0.0 for group in cells), default=0.0)
        return cls(measure=measure, most=most, decimals=_decimals(measure, most))

    def text(self, group: "Group") -> str:
        """Write the number; '?' where none was measured, '-' where all layers are dead."""
        number = self.measure.value(group)
        if number is None:
            return "?"
        return self.written(number) if group.norm else "-"

    def written(self, number: float) -> str:
        """Write a number, with as many decimals as its neighbours."""
        return f"{number * self.measure.unit:.{self.decimals}f}"

    def heat(self, group: "Group") -> float | None:
        """Return how much of the largest number this is, from 0 to 1; None where there is none."""
        number = self.measure.value(group)
        if number is None or not group.norm or not self.most:
            return None
        part = number / self.most
        return math.sqrt(part) if self.measure.squared else part

    def at(self, heat: float) -> str:
        """Write the number that has a heat."""
        return self.written(self.most * (heat**2 if self.measure.squared else heat))


def _decimals(measure: Measure, most: float) -> int:
    if measure.decimals is not None:
        return measure.decimals
    top = most * measure.unit
    before = math.floor(math.log10(top)) + 1 if top > 0 else 0
    return max(0, min(_MOST_DECIMALS, _DIGITS - before))


def has(found: "Inspection", measure: Measure) -> bool:
    """Tell whether any cell has this number."""
    return any(
        measure.value(group) is not None for groups in found.cells.values() for group in groups
    )


def short_kinds(found: "Inspection") -> dict[str, str]:
    """Return the kinds of layers with short names: TE1 and TE2 for text encoders, TE for one."""
    texts = [kind.id for kind in found.kinds if kind.id.startswith(TEXT_ENCODERS)]
    short = {name: f"TE{name.removeprefix(TEXT_ENCODERS).strip('_') or 1}" for name in texts}
    if texts == [TEXT_ENCODERS]:
        short = {TEXT_ENCODERS: "TE"}
    return {kind.id: short.get(kind.id, kind.id) for kind in found.kinds}
