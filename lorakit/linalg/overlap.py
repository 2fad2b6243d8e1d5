"""How much of one matrix's directions lies in another's."""

from dataclasses import dataclass

from torch import Tensor

from lorakit.linalg.factored import Factors, decomposed, numerical_rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """The singular directions of ΔW that are no rounding: u [m, r] and v [n, r] in fp64."""

    u: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """How many there are."""
        return int(self.u.shape[1])


def frame_of(factors: Factors) -> Frame:
    """Return the directions of a product."""
    found = decomposed(factors)
    kept = found.first(numerical_rank(found.s, factors.shape))
    return Frame(u=kept.u.double(), v=kept.v.double())


def overlap(one: Frame, other: Frame) -> float:
    """Return the mean squared cosine of the angles between two frames, of both sides.

    ‖U₁ᵀU₂‖² over the smaller rank: 1 where the smaller one lies inside the larger, 0 where they are
    orthogonal.
    """
    least = min(one.rank, other.rank)
    if not least:
        return 0.0
    squares = (one.u.T @ other.u).square().sum() + (one.v.T @ other.v).square().sum()
    return float(squares) / (2 * least)


def chance(one: Frame, other: Frame) -> float:
    """Return the mean `overlap` of unrelated directions: the larger rank over the side."""
    most = max(one.rank, other.rank)
    return min(1.0, (most / len(one.u) + most / len(one.v)) / 2) if one.rank and other.rank else 0.0
