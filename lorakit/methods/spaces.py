"""Where an elementwise method acts when it does not act on ΔW itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lorakit.linalg.factored import Factors, reduced
from lorakit.linalg.tiles import Change
from lorakit.linalg.tiles import dense as made
from lorakit.methods.cores import as_factors, cores_of, directions, nothing
from lorakit.methods.delta import Delta

Act = Callable[[Sequence[Delta]], Change]


def in_core(deltas: Sequence[Delta], act: Act) -> Factors:
    """Let a method act on small cores: each ΔW between the singular bases of all of them.

    Args:
        deltas: of one module.
        act: merges matrices [a, b] of one shape.

    Returns:
        Factors of at most the sum of the ranks: nothing of the result is lost.

    Source: see `cores.cores_of`.
    """
    found = cores_of([delta.change for delta in deltas])
    if not found.cores[0].numel():
        return nothing(deltas[0].shape)
    acted = [replace(d, change=core) for d, core in zip(deltas, found.cores, strict=True)]
    return found.spread(made(act(acted)))


def in_knots(deltas: Sequence[Delta], act: Act) -> Factors:
    """Let a method act on ΣVᵀ: the ΔW side by side share their left singular basis.

    Args:
        deltas: of one module.
        act: merges matrices [a, n] of one shape.

    Returns:
        Factors of at most the sum of the ranks.

    Source: KnOTS, arXiv 2410.19735.

    Cost: O((m + n T) R²), R the sum of the ranks.
    """
    factors = [as_factors(delta.change) for delta in deltas]
    left = reduced(torch.cat([f.up.double() for f in factors], dim=1))
    ups = left.core * left.lengths
    ends = torch.tensor([f.rank for f in factors]).cumsum(0).tolist()
    blocks = [
        ups[:, end - f.rank : end] @ f.down.double() for end, f in zip(ends, factors, strict=True)
    ]
    basis = directions(torch.cat(blocks, dim=1))
    if not basis.numel():
        return nothing(deltas[0].shape)
    acted = [replace(d, change=basis.T @ b) for d, b in zip(deltas, blocks, strict=True)]
    return Factors(up=left.turned(basis), down=made(act(acted)))
