"""Three dense ΔW become one by ties: mergekit's, which holds the layer several times."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import seeded
import torch
from torch import Tensor

from benchmarks.options import Options
from benchmarks.peers.result import Compared, Took, error, narrowed, timed
from lorakit.compute import Compute, ordered_map
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method
from lorakit.methods.table import combine

PACKAGE = "mergekit"
SHAPES = (*[(1280, 1280)] * 3, *[(1280, 5120)] * 2)
STRENGTHS = {"first": 1.0, "second": 0.5, "third": 0.25}
DENSITY = 0.3

Deltas = dict[str, dict[str, Tensor]]
"""Layer -> owner -> ΔW."""


def compared(given: Options) -> list[Compared]:
    """Take ties in the full space, in mergekit's flavor, which divides by the strengths."""
    deltas = {
        layer: {owner: _delta(layer, shape, seed) for seed, owner in enumerate(STRENGTHS)}
        for layer, shape in narrowed(SHAPES, given.factor).items()
    }
    exact = {
        layer: ties([delta.double() for delta in own.values()]) for layer, own in deltas.items()
    }
    method = import_module("mergekit.merge_methods.registry").get("ties")
    groups = import_module("mergekit.merge_methods.base").TensorGroup
    return [
        Compared(
            job=f"ties of three dense ΔW, {len(deltas)} layers",
            ours=_took(lambda: _lorakit(deltas, given), exact),
            theirs=_took(lambda: _mergekit(deltas, method, groups), exact),
        )
    ]


def _delta(layer: str, shape: tuple[int, int], seed: int) -> Tensor:
    up, down = seeded.factors(layer, *shape, seed=seed, rank=32)
    return up @ down


def _took(merge: Callable[[], dict[str, Tensor]], exact: dict[str, Tensor]) -> Took:
    found, seconds = timed(merge)
    return Took(
        seconds=seconds, error=error((found[layer], delta) for layer, delta in exact.items())
    )


def _lorakit(deltas: Deltas, given: Options) -> dict[str, Tensor]:
    method = Method(name="ties", flavor="mergekit", density=DENSITY).filled(into_lora=False)

    def merged(layer: str) -> Tensor:
        terms = [
            Delta(change=delta, strength=STRENGTHS[owner], owner=owner)
            for owner, delta in deltas[layer].items()
        ]
        return dense(combine(terms, method, module=layer))

    compute = Compute.of(device=given.device, threads=given.threads)
    return dict(zip(deltas, ordered_map(merged, deltas, compute=compute), strict=True))


def _mergekit(deltas: Deltas, method: Any, groups: Any) -> dict[str, Tensor]:
    parameters = {"weight": STRENGTHS, "density": dict.fromkeys(STRENGTHS, DENSITY)}
    found = {}
    for layer, own in deltas.items():
        base = torch.zeros_like(own["first"])
        group = groups.from_tensors([base, *own.values()], ids=["base", *own], base_index=0)
        found[layer] = method([group], parameters=parameters)[0]
    return found


def ties(deltas: list[Tensor]) -> Tensor:
    """Return what ties makes of ΔW in float64: trimmed, a sign elected, a weighted mean of those.

    Source: Yadav et al., TIES-Merging (2023), with the strengths as mergekit has them.
    """
    trimmed = []
    for delta in deltas:
        kept = int(DENSITY * delta.numel())
        places = delta.abs().flatten().topk(kept).indices
        mask = torch.zeros(delta.numel(), dtype=torch.bool)
        mask[places] = True
        trimmed.append(torch.where(mask.reshape(delta.shape), delta, 0.0))
    strengths = torch.tensor(list(STRENGTHS.values()), dtype=torch.float64)[:, None, None]
    terms = strengths * torch.stack(trimmed)
    agreeing = (terms != 0) & (terms.sign() == terms.sum(0).sign())
    divisor = (strengths * agreeing).sum(0)
    return (terms * agreeing).sum(0) / torch.where(divisor == 0, 1.0, divisor)
