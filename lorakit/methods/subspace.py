"""Methods on singular directions: tsv, iso-c, iso-cts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, Svd, decomposed, join, norm, numerical_rank, scaled
from lorakit.methods.cores import as_factors, distinct, nothing
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method

_SAME = 1e-10
"""Squared singular values of side-by-side unit directions below this share are rounding."""


def tsv(deltas: Sequence[Delta], method: Method, rank: int | None) -> Factors:
    """Give each LoRA directions of its own: the nearest orthonormal ones to those of all.

    With strength · ΔW = U_t S_t V_tᵀ the result is Û · diag(S) · V̂ᵀ, Û and V̂ the polar factors of
    [U₁ … U_T] and [V₁ … V_T].

    Args:
        deltas: of one module.
        method: not looked at.
        rank: what the output keeps: each LoRA is cut to its share first.

    Source: TSV-M, arXiv 2412.00081.

    - on the numerical rank of each ΔW: the dense recipe keeps arbitrary null directions
    - the square root's pseudo-inverse: the same LoRA twice is itself
    - the rank is shared out among the LoRAs that differ
    """
    del method
    factors = [as_factors(delta.change) for delta in deltas]
    found = [_live(scaled(f, d.strength)) for f, d in zip(factors, deltas, strict=True)]
    if not any(len(f.s) for f in found):
        return nothing(deltas[0].shape)
    if rank is not None:
        share = -(-rank // len(distinct(factors)[0]))
        found = [Svd(u=f.u[:, :share], s=f.s[:share], v=f.v[:, :share]) for f in found]
    strengths = torch.cat([f.s for f in found])
    left = polar(torch.cat([f.u for f in found], dim=1))
    right = polar(torch.cat([f.v for f in found], dim=1))
    return Factors(up=left * strengths, down=right.T)


def iso_c(deltas: Sequence[Delta], method: Method, rank: int | None) -> Factors:
    """Give every singular direction of the sum the mean of the singular values.

    Args:
        deltas: of one module.
        method: not looked at.
        rank: what the output keeps: its leading directions, at the mean of all.

    Source: Iso-C, arXiv 2502.04959.

    - the mean over the numerical rank: over all directions most of the energy goes to null ones
    """
    del method
    found = _sum(deltas)
    if not len(found.s):
        return nothing(deltas[0].shape)
    kept = len(found.s) if rank is None else min(rank, len(found.s))
    mean = float(found.s.mean())
    return Factors(up=found.u[:, :kept] * mean, down=found.v[:, :kept].T)


def iso_cts(deltas: Sequence[Delta], method: Method, rank: int | None) -> Factors:
    """As iso-c, with a share of the directions kept for what is each LoRA's own.

    The leading directions of the sum are common; what of each LoRA lies outside their columns
    gives the others, as many for each; all are made orthonormal together and get the mean of
    their singular values.

    Args:
        deltas: of one module.
        method: its density is the share of common directions.
        rank: what the output keeps.

    Source: Iso-CTS, arXiv 2502.04959.

    - the directions are shared out over the numerical rank of the sum
    - what of a LoRA is common but for rounding gives no direction; the paper's code takes noise
    """
    whole = _sum(deltas)
    if not len(whole.s):
        return nothing(deltas[0].shape)
    kept = len(whole.s) if rank is None else min(rank, len(whole.s))
    own = _own(kept, method.density or 1.0, len(deltas))
    common = kept - own * len(deltas)
    us, vs, values = [whole.u[:, :common]], [whole.v[:, :common]], [whole.s[:common]]
    for delta in deltas:
        found = _outside(whole.u[:, :common], scaled(as_factors(delta.change), delta.strength))
        us.append(found.u[:, :own])
        vs.append(found.v[:, :own])
        values.append(found.s[:own])
    mean = float(torch.cat(values).mean())
    left, right = (polar(torch.cat(ds, dim=1)) for ds in (us, vs))
    return Factors(up=left * mean, down=right.T)


def _own(kept: int, share: float, count: int) -> int:
    """Return how many directions each LoRA gets, the nearest number, as the paper's code has it."""
    return min(round((kept - int(kept * share + 1e-9)) / count), kept // count)


def _outside(common: Tensor, factors: Factors) -> Svd:
    """Return the directions of ΔW that are outside of the common columns by more than rounding."""
    up = factors.up.double()
    rest = up - common @ (common.T @ up)
    return _live(Factors(up=rest, down=factors.down), reference=norm(factors))


def polar(columns: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, of the rank that the columns have.

    Args:
        columns: [d, k] in fp64; where they depend on each other the result has their rank.
    """
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    live = values > _SAME * values[-1].clamp(min=1e-300)
    inverse = torch.where(live, values.clamp(min=1e-300).rsqrt(), 0.0)
    found: Tensor = columns @ ((vectors * inverse) @ vectors.T)
    return found


def _sum(deltas: Sequence[Delta]) -> Svd:
    """Return the singular directions of Σ strength · ΔW that are no rounding."""
    parts = [scaled(as_factors(d.change), d.strength) for d in deltas]
    return _live(join(parts), reference=max(norm(part) for part in parts))


def _live(factors: Factors, *, reference: float | None = None) -> Svd:
    found = decomposed(Factors(up=factors.up.double(), down=factors.down.double()))
    return found.first(numerical_rank(found.s, factors.shape, reference=reference))
