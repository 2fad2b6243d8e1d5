"""linear: the signed sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, weighted
from lorakit.methods.delta import Delta


def linear(deltas: Sequence[Delta]) -> Factors | Tensor:
    """Return Σ strength · ΔW exactly: factors side by side, never added; dense where one is dense.

    Args:
        deltas: of one module, all of one shape.

    Returns:
        Factors whose rank is the sum of the ranks, or a matrix in fp64.

    Source: task arithmetic, arXiv 2212.04089; PEFT's `cat`.
    """
    factors = [(d.change, d.strength) for d in deltas if isinstance(d.change, Factors)]
    if len(factors) == len(deltas):
        return weighted(factors)
    whole = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta in deltas:
        change, strength = delta.change, delta.strength
        if isinstance(change, Factors):
            whole.addmm_(change.up.double(), change.down.double(), alpha=strength)
        else:
            whole.add_(change.double().reshape(whole.shape), alpha=strength)
    return whole
