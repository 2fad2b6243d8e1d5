"""One module's exact ΔW on its way to a LoRA, made when it is asked for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.adapters import is_vector
from lorakit.linalg.devices import Writer
from lorakit.linalg.factored import Factors, Framed
from lorakit.linalg.ranks import Scorer
from lorakit.linalg.single import Term

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
        write: writes ΔW in fp32 into a matrix, where it is made as one.
        terms: what ΔW is the sum of, where that is products of factors in 16 bits.
        base: reads the weight that ΔW changes, where the output's kind needs it.
        rank_before: the largest rank among the inputs, None where ΔW is dense.
        rank_bound: no ΔW here has a larger rank, or none is kept where `capped`.
        capped: whether a dense method made the ΔW of factors: without a rank rule it is cut to the
            sum of their ranks.
        floor: ‖·‖ of the largest part that was summed; what cancels below its rounding is noise.
            Where that is below the number that it is given, a bound below that number will do.
        cost: bytes that one evaluation takes at once.
        scorer: what the singular values are measured by, where a rule or a budget asks for that.
        place: the file and the offset where it is read, so that files are read in their order.
    """

    module: str
    block: str
    shape: tuple[int, ...]
    truth: Callable[[], Factors | Framed | Tensor]
    write: Writer | None = None
    terms: Sequence[Term] | None = None
    base: Callable[[], Tensor] | None = None
    rank_before: int | None = None
    rank_bound: int
    capped: bool = False
    floor: Callable[[float], float] | None = None
    cost: int = 0
    scorer: Scorer | None = None
    place: tuple[str, int] = ("", 0)

    @property
    def conv(self) -> bool:
        """Whether the kernel is larger than 1x1."""
        return math.prod(self.shape[2:]) > 1

    @property
    def vector(self) -> bool:
        """Whether it is a bias, a norm or a modulation, which has no rank."""
        return is_vector(self.shape)

    @property
    def bytes_a_rank(self) -> int:
        """Elements of one direction: out + in · kh · kw."""
        return self.shape[0] + math.prod(self.shape[1:])
