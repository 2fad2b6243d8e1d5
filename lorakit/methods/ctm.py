"""ctm: one small basis on each side that all LoRAs share best, and their sum in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, numerical_rank
from lorakit.methods.cores import as_factors, cores_of, nothing
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method

_STEPS, _GAIN = 100, 1e-5


def ctm(deltas: Sequence[Delta], method: Method, rank: int | None) -> Factors:
    """Sum the LoRAs in the two bases of k directions that hold most of all of them together.

    The bases minimise Σ‖strength · ΔW − P Pᵀ (strength · ΔW) Q Qᵀ‖², found from the leading
    directions by turns until a turn gains less than 1e-5 of the energy; the result
    P (Σ Pᵀ (strength · ΔW) Q) Qᵀ has rank k by construction.

    Args:
        deltas: of one module.
        method: not looked at.
        rank: k; the largest numerical rank among the inputs if left out.

    Source: CtM, arXiv 2606.03723; higher-order orthogonal iteration, De Lathauwer et al. (2000).

    - a strength counts for the bases too: the paper's β = 1, not a norm that is evened out

    Cost: as `cores_of`, and two eigenvalue problems of the core's size a turn; 2 to 21 turns seen.
    """
    del method
    found = cores_of([as_factors(delta.change) for delta in deltas])
    cores = [d.strength * core for d, core in zip(deltas, found.cores, strict=True)]
    if not cores[0].numel():
        return nothing(deltas[0].shape)
    left, right = _bases(cores, rank or _largest_rank(found.cores))
    small = left.T @ torch.stack(cores).sum(dim=0) @ right
    return Factors(up=found.left(left @ small), down=found.right(right).T)


def _largest_rank(cores: Sequence[Tensor]) -> int:
    shape = (int(cores[0].shape[0]), int(cores[0].shape[1]))
    return max(numerical_rank(torch.linalg.svdvals(core), shape) for core in cores)


def _bases(cores: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal [a, k] and [b, k] that hold most of the cores' energy."""
    right = _leading([core.T for core in cores], rank)
    before = -1.0
    for _ in range(_STEPS):
        left = _leading([core @ right for core in cores], rank)
        turned = [core.T @ left for core in cores]
        right = _leading(turned, rank)
        held = sum(float((right.T @ block).square().sum()) for block in turned)
        if held <= before * (1 + _GAIN):
            break
        before = held
    return left, right


def _leading(blocks: Sequence[Tensor], rank: int) -> Tensor:
    wide = torch.cat(tuple(blocks), dim=1)
    found: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
    return found.flip(1)[:, :rank]
