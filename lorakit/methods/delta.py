"""What every method combines: one LoRA's ΔW of one module."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.linalg.factored import Factors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta:
    """One LoRA's ΔW of one module, and how strongly it counts.

    Args:
        change: ΔW at strength 1: factors, or a matrix [out, in · kh · kw].
        strength: the user's coefficient, any real number but 0.
        owner: what names its random streams; see `operations.owners`.
    """

    change: Factors | Tensor
    strength: float
    owner: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in · kh · kw)."""
        rows, columns = self.change.shape
        return int(rows), int(columns)


def alone(deltas: Sequence[Delta]) -> bool:
    """Tell whether one ΔW acts here, perhaps several times: then nothing interferes.

    Args:
        deltas: equal ones share their ΔW, see `sameness.unified`.
    """
    return all(delta.change is deltas[0].change for delta in deltas)
