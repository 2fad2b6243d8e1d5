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
        owner: what names its random streams: the content of the LoRA, `#2` behind its second use.
    """

    change: Factors | Tensor
    strength: float
    owner: str = ""

    @property
    def content(self) -> str:
        """The content of the LoRA, the same for each of its uses."""
        return self.owner.partition("#")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in · kh · kw)."""
        rows, columns = self.change.shape
        return int(rows), int(columns)


def alone(deltas: Sequence[Delta]) -> bool:
    """Tell whether one LoRA acts here, perhaps several times: then nothing interferes."""
    owners = {delta.content for delta in deltas}
    return len(deltas) == 1 or (len(owners) == 1 and "" not in owners)
