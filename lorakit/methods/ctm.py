"""ctm: one small basis on each side that all LoRAs share best, and their sum in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.methods.cores import as_factors, cores_of, nothing
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method

_STEPS, _STILL = 200, 1e-13


def ctm(deltas: Sequence[Delta], method: Method, rank: int | None) -> Factors:
    """Sum the LoRAs in the two bases of k directions that hold most of all of them together.

    The bases minimise Σ‖strength · ΔW − P Pᵀ (strength · ΔW) Q Qᵀ‖², found from the leading
    directions by turns until nothing is gained; the result P (Σ Pᵀ (strength · ΔW) Q) Qᵀ has rank
    k by construction.

    Args:
        deltas: of one module.
        method: not looked at.
        rank: k; the largest rank among the inputs if left out.

    Source: CtM, arXiv 2606.03723; higher-order orthogonal iteration, De Lathauwer et al. (2000).
    """
    del method
    found = cores_of([as_factors(delta.change) for delta in deltas])
    cores = [d.strength * core for d, core in zip(deltas, found.cores, strict=True)]
    wanted = rank or max(as_factors(delta.change).rank for delta in deltas)
    if not cores[0].numel():
        return nothing(deltas[0].shape)
    left, right = _bases(cores, wanted)
    small = left.T @ torch.stack(cores).sum(dim=0) @ right
    return Factors(up=found.left(left @ small), down=found.right(right).T)


def _bases(cores: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal [a, k] and [b, k] that hold most of the cores' energy."""
    right = _leading(torch.cat([core.T for core in cores], dim=1), rank)
    before = -1.0
    for _ in range(_STEPS):
        left = _leading(torch.cat([core @ right for core in cores], dim=1), rank)
        turned = torch.cat([core.T @ left for core in cores], dim=1)
        right = _leading(turned, rank)
        held = float(sum((left.T @ core @ right).square().sum() for core in cores))
        if held <= before * (1 + _STILL):
            break
        before = held
    return left, right


def _leading(wide: Tensor, rank: int) -> Tensor:
    found: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
    return found.flip(1)[:, :rank]
