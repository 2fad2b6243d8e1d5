"""pico: weaken the output directions that the LoRAs share, before they are merged."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, scaled, svd
from lorakit.linalg.sides import Side, reduced
from lorakit.linalg.tiles import dense as made
from lorakit.methods.cores import as_factors
from lorakit.methods.delta import Delta


def pico(deltas: Sequence[Delta]) -> list[Delta]:
    """Return the ΔW with each shared output direction divided by how often it is counted.

    With [B₁ … B_T] = U Σ Vᵀ, B_t the left factor of strength · ΔW_t, c = σ² / Σσ² and
    a = 1 / (1 + (T − 1) c), each ΔW becomes (1 + U diag(a − 1) Uᵀ) ΔW. The norm that goes with it,
    the mean of those of the strength · ΔW_t before, is `match_norm`'s.

    Args:
        deltas: of one module.

    Source: Pico, arXiv 2604.16826.

    - on factors of equal norms, U√S, so that nothing depends on how a LoRA is factored

    Cost: O((m + n) R²), R the sum of the ranks.
    """
    side = reduced(torch.cat([_balanced_up(delta) for delta in deltas], dim=1))
    u, s, _ = torch.linalg.svd(side.core * side.lengths, full_matrices=False)
    shares = s.square() / s.square().sum().clamp(min=1e-300)
    weaker = 1 / (1 + (len(deltas) - 1) * shares) - 1
    return [replace(delta, change=_turned(delta, side, u, weaker)) for delta in deltas]


def _balanced_up(delta: Delta) -> Tensor:
    found = svd(scaled(as_factors(delta.change), abs(delta.strength)))
    return found.u.double() * found.s.sqrt()


def _turned(delta: Delta, side: Side, u: Tensor, weaker: Tensor) -> Factors | Tensor:
    change = delta.change
    up = (change.up if isinstance(change, Factors) else made(change)).double()
    basis = side.turned(u)
    turned = up + (basis * weaker) @ (basis.T @ up)
    if isinstance(change, Factors):
        return Factors(up=turned, down=change.down.double())
    return turned
