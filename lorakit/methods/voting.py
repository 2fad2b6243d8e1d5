"""The sign that the LoRAs elect for each element, and how those that agree are combined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.methods.method import Method

MERGEKIT_MEANS = ("ties", "della-ties")
"""mergekit divides by Σ strength by default in these; its other methods give a sum."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ballot:
    """How signs are elected and what follows.

    Args:
        strengths: one a LoRA.
        votes: "mass" or "frequency".
        flavor: whose conventions.
        normalize: divide by the strengths of those that agree.
        majority: tells the sign of the whole, asked for where a sum is exactly zero.
    """

    strengths: Sequence[float]
    votes: str
    flavor: str
    normalize: bool
    majority: Callable[[], float]

    @staticmethod
    def of(method: Method, strengths: Sequence[float], majority: Callable[[], float]) -> "Ballot":
        """Return the ballot that a method, with every parameter set, holds."""
        mean = method.flavor == "mergekit" and method.name in MERGEKIT_MEANS
        return Ballot(
            strengths=strengths,
            votes=method.votes or "mass",
            flavor=method.flavor,
            normalize=method.normalize or mean,
            majority=majority,
        )

    def combined(self, kept: Sequence[Tensor]) -> Tensor:
        """Return what the LoRAs that agree with the elected sign make together.

        Args:
            kept: one tile a LoRA, what is left of ΔW.

        Source: TIES, arXiv 2306.01708; the flavors as mergekit 0.1.5 and PEFT 0.21.2 have them.
        """
        signs = [self._sign(strength) for strength in self.strengths]
        elected = self._elected([tile * sign for tile, sign in zip(kept, signs, strict=True)])
        total, count = torch.zeros_like(elected), torch.zeros_like(elected)
        for tile, sign, strength in zip(kept, signs, self.strengths, strict=True):
            agrees = (tile * (1.0 if sign > 0 else -1.0) * elected > 0).to(elected.dtype)
            total.addcmul_(tile, agrees, value=strength)
            count.add_(agrees, alpha=self._share(strength))
        return self._divided(total, count)

    def _sign(self, strength: float) -> float:
        """Return what a LoRA's vote is multiplied by."""
        if self.flavor == "mergekit":
            return strength
        return 1.0 if strength > 0 or self.flavor != "lorakit" else -1.0

    def _elected(self, votes: Sequence[Tensor]) -> Tensor:
        mass = torch.zeros_like(votes[0])
        count = torch.zeros_like(votes[0])
        for vote in votes:
            mass += vote
            if self.votes == "frequency":
                count += vote.sign()
        if self.votes == "frequency":
            mass = torch.where(count == 0, mass, count) if self.flavor == "lorakit" else count
        sign = mass.sign_()
        if self.flavor == "lorakit":
            return sign
        undecided = sign == 0
        if bool(undecided.any()):
            # Where nothing is left of any LoRA, nobody agrees with any sign.
            sign[undecided] = self.majority() if self.flavor == "paper" else 1.0
        return sign

    def _share(self, strength: float) -> float:
        if self.flavor == "lorakit":
            return abs(strength)
        return strength if self.flavor == "mergekit" else 1.0

    def _divided(self, total: Tensor, count: Tensor) -> Tensor:
        if self.flavor == "mergekit" and not self.normalize:
            return total
        total /= torch.where(count == 0, torch.ones_like(count), count)
        if self.flavor == "lorakit" and not self.normalize:
            total *= sum(abs(strength) for strength in self.strengths) / len(self.strengths)
        return total
