"""How many directions to keep: the rank rules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from lorakit.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

_ONE_OF = ("energy", "error", "sv_ratio", "sv_sum", "size", "threshold")
_SLACK = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRule:
    """A rule for the rank of each layer; `rank` beside another rule is a cap.

    Args:
        rank: directions to keep, capped by the layer.
        conv_rank: the same for kernels over 1x1; `rank` where it is left out.
        energy: the fewest directions with this share of Σσ².
        error: the fewest with at most this relative error.
        sv_ratio: those with σ > σ₁ / sv_ratio.
        sv_sum: the fewest with this share of Σσ.
        size: bytes of the whole file.
        threshold: those with this score, a logarithm to base 10, or a larger one.

    Raises:
        SpecError: a number is out of range, or two rules are given.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    error: float | None = None
    sv_ratio: float | None = None
    sv_sum: float | None = None
    size: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in _ONE_OF if getattr(self, name) is not None]
        if len(given) > 1:
            raise SpecError(f"Give one rank rule, found {' and '.join(given)}; --rank may cap it.")
        ranges = {
            "rank": (1, math.inf),
            "conv_rank": (1, math.inf),
            "energy": (0, 1),
            "error": (0, 1),
            "sv_ratio": (1, math.inf),
            "sv_sum": (0, 1),
            "size": (1, math.inf),
            "threshold": (-1000, 1000),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise SpecError(f"{name} must lie between {low:g} and {high:g}, found {value:g}.")

    @property
    def exact(self) -> bool:
        """Whether nothing is given: keep the numerical rank."""
        return self == RankRule()

    @property
    def whole(self) -> bool:
        """Whether the rule is a plain rank, which needs no more of the spectrum."""
        return all(getattr(self, name) is None for name in _ONE_OF)

    def cap(self, conv: bool) -> int | None:
        """Return the largest rank that the rule allows a layer."""
        return self.conv_rank if conv and self.conv_rank is not None else self.rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """What a layer's singular values are measured by: their score is log10 of σ / reference.

    A reference may be a weighted geometric mean of several.

    Args:
        reference: log10 of what does not hang on the LoRA: one number, or one a direction, [k].
        of_largest: the weight of σ₁ in the reference.
        of_norm: the weight of ‖ΔW‖ in the reference.
        rescale: what ΔW was multiplied by; σ₁ and ‖ΔW‖ count as they were before.
    """

    reference: "Tensor"
    of_largest: float = 0.0
    of_norm: float = 0.0
    rescale: float = 1.0

    @property
    def directional(self) -> bool:
        """Whether a smaller singular value may have a larger score."""
        return self.reference.ndim > 0

    def scores(self, s: "Tensor", energy: float) -> "Tensor":
        """Return the score of each singular value, [k] in fp64 on the CPU.

        Args:
            s: falling and not 0, [k].
            energy: Σσ² of the whole layer.
        """
        logs = s.double().cpu().log10()
        found = logs - (self.reference[: len(logs)] if self.directional else self.reference)
        if not len(logs):
            return found
        before = math.log10(self.rescale)
        norm = math.log10(energy) / 2
        return found - self.of_largest * (logs[0] - before) - self.of_norm * (norm - before)


def choose_rank(
    s: "Tensor",
    rule: RankRule,
    *,
    conv: bool = False,
    energy_total: float | None = None,
    sum_total: float | None = None,
    scores: "Tensor | None" = None,
) -> int:
    """Return how many of the singular values a rule keeps: at least 1 where any is not 0.

    Only a threshold may keep none.

    Args:
        s: falling, [k]; with `energy_total` perhaps only the leading ones.
        rule: the rule; `size` is decided over all layers, here it keeps all.
        conv: whether the kernel is over 1x1.
        energy_total: Σσ² of the whole layer.
        sum_total: Σσ of the whole layer.
        scores: of the singular values, falling, [k]; a threshold needs them.

    Raises:
        SpecError: there is a threshold, and no scores.

    Source: kohya's `resize_lora.py`, without its off-by-one: each of its rules keeps one too many.
    """
    values = s.double()
    alive = int((values > 0).sum())
    if not alive:
        return 0
    cap = rule.cap(conv)
    most = alive if cap is None else min(cap, alive)
    if rule.threshold is not None:
        if scores is None:
            raise SpecError("A threshold needs scores, and only resize gives them; give --rank.")
        return min(most, int((scores >= rule.threshold).sum()))
    return max(1, min(most, _wanted(values, rule, energy_total, sum_total)))


def _wanted(
    s: "Tensor", rule: RankRule, energy_total: float | None, sum_total: float | None
) -> int:
    if rule.sv_ratio is not None:
        return int((s * rule.sv_ratio > s[0]).sum())
    if rule.sv_sum is not None:
        whole = float(s.sum()) if sum_total is None else sum_total
        return _fewest(s.cumsum(0), rule.sv_sum * whole)
    energy = rule.energy if rule.error is None else 1 - rule.error**2
    if energy is None:
        return len(s)
    whole = float((s**2).sum()) if energy_total is None else energy_total
    return _fewest((s**2).cumsum(0), energy * whole)


def _fewest(sums: "Tensor", goal: float) -> int:
    """Return the fewest terms whose sum reaches the goal, up to rounding."""
    return int((sums < goal * (1 - _SLACK)).sum()) + 1


def kept(s: "Tensor", rank: int, *, energy_total: float | None = None) -> tuple[float, float]:
    """Return the share of Σσ² that `rank` directions keep, and the relative error."""
    squares = s.double() ** 2
    whole = float(squares.sum()) if energy_total is None else energy_total
    if whole <= 0:
        return 1.0, 0.0
    share = min(1.0, float(squares[:rank].sum()) / whole)
    rest = float(squares[rank:].sum()) if energy_total is None else whole * (1 - share)
    return share, math.sqrt(max(0.0, rest) / whole)


def _worth_a_byte(squares: Sequence[float], price: int, overhead: int) -> list[float]:
    """Return what each direction is worth a byte; the first ones share what the first costs more.

    Args:
        squares: what they are worth, falling.
        price: bytes of each.
        overhead: bytes that the first costs besides.
    """
    sums = list(accumulate(squares))
    shared = [whole / (overhead + price * count) for count, whole in enumerate(sums, start=1)]
    best = max(shared, default=0.0)
    several = shared.index(best) + 1 if shared else 0
    return [best] * several + [value / price for value in squares[several:]]


def ranks_for_size(
    spectra: "Mapping[str, Tensor]",
    bytes_a_rank: Mapping[str, int],
    budget: int,
    *,
    overhead: Mapping[str, int],
    caps: Mapping[str, int | None],
) -> dict[str, int]:
    """Spend bytes on the directions with the most energy a byte, over all layers at once.

    Args:
        spectra: module -> falling singular values, or what they are relative to a reference.
        bytes_a_rank: module -> bytes of one direction.
        budget: bytes for all.
        overhead: module -> bytes that its first direction costs besides.
        caps: module -> the largest rank it may have.

    Returns:
        module -> rank, 0 where the budget does not reach it; its cost never exceeds the budget.

    Source: resize_lora's `size`, which ranks by score alone in spite of its description.

    - A layer's first directions share the bytes of its names: a small layer that is not worth its
      entries in the header gets none.
    """
    items: list[tuple[float, str, int]] = []
    for module, s in spectra.items():
        cap = caps.get(module)
        squares = [value * value for value in s.double().tolist()[:cap] if value > 0]
        worth = _worth_a_byte(squares, bytes_a_rank[module], overhead[module])
        items += [(value, module, place) for place, value in enumerate(worth)]
    items.sort(key=lambda item: (-item[0], item[1], item[2]))
    ranks = dict.fromkeys(spectra, 0)
    left = budget
    for _, module, place in items:
        price = bytes_a_rank[module] + (0 if place else overhead[module])
        if place == ranks[module] and price <= left:
            ranks[module] += 1
            left -= price
    return ranks
