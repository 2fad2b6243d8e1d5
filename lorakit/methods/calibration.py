"""pico: weaken the output directions that the LoRAs share, before they are merged."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, scaled, svd
from lorakit.linalg.tiles import dense as made
from lorakit.methods.cores import as_factors
from lorakit.methods.delta import Delta


def pico(deltas: Sequence[Delta]) -> list[Delta]:
    """Return the ΔW with each shared output direction divided by how often it is counted.

    With [B₁ … B_T] = U Σ Vᵀ, B_t the left factor of strength · ΔW_t, c = σ² / Σσ² and
    a = 1 / (1 + (T − 1) c), each ΔW becomes (1 + U diag(a − 1) Uᵀ) ΔW.

    Args:
        deltas: of one module.

    Source: Pico, arXiv 2604.16826.

    - on factors of equal norms, U√S, so that nothing depends on how a LoRA is factored
    """
    sides = [_balanced_up(delta) for delta in deltas]
    u, s, _ = torch.linalg.svd(torch.cat(sides, dim=1), full_matrices=False)
    shares = s.square() / s.square().sum().clamp(min=1e-300)
    weaker = 1 / (1 + (len(deltas) - 1) * shares) - 1
    return [replace(delta, change=_turned(delta, u, weaker)) for delta in deltas]


def _balanced_up(delta: Delta) -> Tensor:
    found = svd(scaled(as_factors(delta.change), abs(delta.strength)))
    return found.u.double() * found.s.sqrt()


def _turned(delta: Delta, u: Tensor, weaker: Tensor) -> Factors | Tensor:
    change = delta.change
    side = (change.up if isinstance(change, Factors) else made(change)).double()
    turned = side + (u * weaker) @ (u.T @ side)
    return Factors(up=turned, down=change.down) if isinstance(change, Factors) else turned
