"""The sign that the LoRAs elect for each element, and how those that agree are combined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from lorakit.methods.method import Method

MERGEKIT_MEANS = ("ties", "della-ties")
"""mergekit divides by Σ strength by default in these; its other methods give a sum."""


TINY = float(torch.finfo(torch.float32).tiny)
SLACK = 1e-10
"""A million times the rounding of fp64, a thousandth of that of a file in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ballot:
    """How signs are elected, and what those that agree make together.

    Args:
        voices: what each LoRA's ΔW is multiplied by where it votes.
        strengths: what it is multiplied by where it agrees.
        shares: what it then adds to the divisor; none: the sum is not divided.
        least: the least divisor; None: any but zero, in place of which it is 1.
        by_number: whether the number of LoRAs decides, not their sum.
        fallback: whether the sum decides where as many are for + as for −.
        slack: in fp64, votes that cancel to this share of their sizes elect no sign.
        tie: the sign where nothing decides; 0: nothing is kept there.
        majority: tells the sign where nothing decides, asked for where that is so.
    """

    voices: Sequence[float]
    strengths: Sequence[float]
    shares: Sequence[float] = ()
    least: float | None = TINY
    by_number: bool = False
    fallback: bool = False
    slack: float = 0.0
    tie: float = 0.0
    majority: Callable[[], float] | None = None

    def combined(self, kept: Tensor) -> Tensor:
        """Return what the LoRAs that agree with the elected sign make together, [rows, columns].

        Args:
            kept: [T, rows, columns], what is left of each ΔW; overwritten.
        """
        elected = self.elected(kept)
        if self.tie:
            elected.add_(self.tie / 2).sign_()
        if self.majority is not None:
            _settle(elected, kept, self.majority)
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        for index, tile in enumerate(kept):
            # What agrees becomes positive, all else zero.
            turn = -1.0 if self.voices[index] < 0 else 1.0
            agreed = (tile.mul_(elected) if turn > 0 else tile.mul_(elected).neg_()).relu_()
            total.add_(agreed, alpha=turn * self.strengths[index])
            if self.shares:
                divisor.add_(agreed.sign_(), alpha=self.shares[index])
        total.mul_(elected)
        if not self.shares:
            return total
        # Where nobody agrees the sum is zero, too.
        if self.least is None:
            values = divisor.numpy()
            values += values == 0
        return total.div_(divisor.clamp_(min=self.least) if self.least else divisor)

    def elected(self, kept: Tensor) -> Tensor:
        """Return the sign of each element's election [rows, columns], 0 where it is undecided.

        Args:
            kept: [T, rows, columns].
        """
        # Of strengths of one size the signs are the votes: what cancels then cancels exactly.
        size = max(map(abs, self.voices))
        mass = torch.zeros_like(kept[0])
        for voice, tile in zip(self.voices, kept, strict=True):
            mass.add_(tile, alpha=voice / size)
        # The elements of cores are rounded: what is equal there differs in its last bits.
        if self.slack and mass.dtype == torch.float64:
            pairs = zip(self.voices, kept, strict=True)
            sizes = sum(abs(voice) / size * tile.abs() for voice, tile in pairs)
            mass.mul_(mass.abs() > self.slack * sizes)
        mass.sign_()
        if not self.by_number:
            return mass
        number = torch.zeros_like(mass)
        for voice, tile in zip(self.voices, kept, strict=True):
            number.add_(tile.sign(), alpha=-1.0 if voice < 0 else 1.0)
        number.sign_()
        return number.mul_(2).add_(mass).sign_() if self.fallback else number


def _settle(elected: Tensor, kept: Tensor, majority: Callable[[], float]) -> None:
    """Give the elements that are undecided though there are votes the sign of the majority."""
    undecided = elected.numpy() == 0
    tied = np.zeros_like(undecided)
    for tile in kept:
        tied |= undecided & (tile.numpy() != 0)
    if tied.any():
        elected.masked_fill_(torch.from_numpy(tied), majority())


def ballot_of(
    method: Method, strengths: Sequence[float], majority: Callable[[Ballot], float]
) -> Ballot:
    """Return the ballot that a method holds.

    Args:
        method: with every parameter set.
        strengths: one a LoRA.
        majority: tells the sign that most elements elect.

    Source: TIES, arXiv 2306.01708; the flavors as mergekit 0.1.5 and PEFT 0.21.2 have them.

    - paper: the majority is the module's, where the code of TIES takes the model's; where there is
      none the element is left out, where that code keeps what is negative
    """
    by_number, count = method.votes == "frequency", len(strengths)
    ones, sizes = [1.0] * count, [abs(strength) for strength in strengths]
    if method.flavor == "lorakit":
        return Ballot(
            voices=[1.0 if strength > 0 else -1.0 for strength in strengths],
            strengths=strengths,
            shares=[size / (1.0 if method.normalize else sum(sizes) / count) for size in sizes],
            by_number=by_number,
            fallback=True,
            slack=SLACK,
        )
    if method.flavor == "mergekit":
        divided = method.normalize or method.name in MERGEKIT_MEANS
        return Ballot(
            voices=strengths,
            strengths=strengths,
            shares=strengths if divided else (),
            least=None if min(strengths) < 0 else TINY,
            by_number=by_number,
            tie=1.0,
        )
    ballot = Ballot(
        voices=ones,
        strengths=strengths,
        shares=sizes if method.normalize else ones,
        by_number=by_number,
        tie=1.0,
    )
    if method.flavor == "peft":
        return ballot
    return replace(ballot, tie=0.0, majority=cache(partial(majority, ballot)))
