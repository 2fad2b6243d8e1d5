"""Where an elementwise method acts when it does not act on ΔW itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lorakit.linalg.factored import Factors
from lorakit.linalg.sides import reduced
from lorakit.linalg.tiles import Change
from lorakit.linalg.tiles import dense as made
from lorakit.methods.cores import as_factors, cores_of, directions, distinct, nothing, spans
from lorakit.methods.delta import Delta

Act = Callable[[Sequence[Delta]], Change]


def in_core(deltas: Sequence[Delta], act: Act) -> Change:
    """Let a method act on small cores: each ΔW between the singular bases of all of them.

    Args:
        deltas: of one module.
        act: merges matrices [a, b] of one shape.

    Returns:
        A core of at most the sum of the ranks: nothing of the result is lost.

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
    factors, places = distinct([as_factors(delta.change) for delta in deltas])
    left = reduced(torch.cat([f.up for f in factors], dim=1))
    ups = left.core * left.lengths
    own = [ups[:, span] @ f.down for span, f in zip(spans(factors), factors, strict=True)]
    basis = directions([own[place] for place in places])
    if not basis.numel():
        return nothing(deltas[0].shape)
    blocks = [basis.T @ block for block in own]
    acted = [replace(d, change=blocks[place]) for d, place in zip(deltas, places, strict=True)]
    return Factors(up=left.turned(basis), down=made(act(acted)))
