"""The LoRA between two models: LyCORIS's `extract_linear`, which takes the whole SVD."""

from importlib import import_module

import seeded
import torch
from torch import Tensor

import lorakit
from benchmarks.options import Options
from benchmarks.peers.result import Compared, Took, error, lora_error, narrowed, timed

PACKAGE = "lycoris-lora"
SHAPES = (*[(640, 640)] * 2, *[(1280, 1280)] * 2, (1280, 2048), (640, 2560))
RANK = 32


def compared(given: Options) -> list[Compared]:
    """Extract from tensors in memory; neither reads or writes a file."""
    shapes = narrowed(SHAPES, given.factor)
    rank = max(1, RANK // given.factor)
    before = {layer: seeded.weight(layer, shape, seed=0) for layer, shape in shapes.items()}
    after = {layer: weight + _change(layer, weight) for layer, weight in before.items()}
    exact = {layer: after[layer].double() - before[layer].double() for layer in shapes}
    return [
        Compared(
            job=f"a LoRA of rank {rank} out of {len(shapes)} layers",
            ours=_lorakit(before, after, exact, rank, given),
            theirs=_lycoris(before, after, exact, rank),
        )
    ]


def _change(layer: str, weight: Tensor) -> Tensor:
    up, down = seeded.factors(layer, *weight.shape, seed=1, rank=64)
    return 0.01 * (up @ down) + 0.001 * seeded.weight(f"noise {layer}", tuple(weight.shape), seed=1)


def _lorakit(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    exact: dict[str, Tensor],
    rank: int,
    given: Options,
) -> Took:
    models = [
        lorakit.open_source({f"{layer}.weight": weight for layer, weight in side.items()})
        for side in (before, after)
    ]
    compute = lorakit.Compute.of(device=given.device, threads=given.threads)
    rule = lorakit.RankRule(rank=rank)
    (lora, _), seconds = timed(
        lambda: lorakit.extract(models[0], models[1], rule=rule, compute=compute)
    )
    return Took(seconds=seconds, error=lora_error(lora, exact))


def _lycoris(
    before: dict[str, Tensor], after: dict[str, Tensor], exact: dict[str, Tensor], rank: int
) -> Took:
    extract_linear = import_module("lycoris.utils").extract_linear

    def extract() -> dict[str, Tensor]:
        found = {}
        for layer, weight in before.items():
            (down, up, _), _ = extract_linear(
                after[layer] - weight, mode="fixed", mode_param=rank, device="cpu"
            )
            found[layer] = up @ down
        return found

    with torch.no_grad():
        found, seconds = timed(extract)
    return Took(
        seconds=seconds, error=error((found[layer], delta) for layer, delta in exact.items())
    )
