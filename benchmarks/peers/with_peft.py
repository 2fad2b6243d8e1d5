"""Two LoRAs become one of the same rank: PEFT's `add_weighted_adapter` by SVD."""

from importlib import import_module
from typing import Any

import seeded
import torch
from torch import Tensor, nn

import lorakit
from benchmarks.options import Options
from benchmarks.peers.result import Compared, Took, error, lora_error, narrowed, timed

PACKAGE = "peft"
SHAPES = (
    *[(640, 640)] * 3,
    (640, 2048),
    (5120, 640),
    (640, 2560),
    *[(1280, 1280)] * 4,
    (1280, 2048),
    (1280, 5120),
)
"""Linear layers of SDXL."""
RANK = 32
STRENGTHS = {"first": 0.7, "second": -0.4}

Factors = dict[str, tuple[Tensor, Tensor]]


def compared(given: Options) -> list[Compared]:
    """Merge with PEFT's defaults, which make U and V whole, and with the thin SVD."""
    shapes = narrowed(SHAPES, given.factor)
    rank = max(1, RANK // given.factor)
    sides = {
        name: {
            layer: seeded.factors(layer, *shape, seed=seed, rank=rank)
            for layer, shape in shapes.items()
        }
        for seed, name in enumerate(STRENGTHS)
    }
    exact = {layer: _exact(sides, layer) for layer in shapes}
    ours = _lorakit(sides, exact, rank, given)
    model = _model(sides, shapes, rank)
    job = f"two LoRAs of rank {rank} to one, {len(shapes)} layers"
    return [
        Compared(job=f"{job}{title}", ours=ours, theirs=_peft(model, exact, rank, full))
        for title, full in ((", its defaults", True), (", its thin SVD", False))
    ]


def _exact(sides: dict[str, Factors], layer: str) -> Tensor:
    terms = []
    for name, strength in STRENGTHS.items():
        up, down = sides[name][layer]
        terms.append(strength * (up.double() @ down.double()))
    return sum(terms[1:], terms[0])


def _lorakit(
    sides: dict[str, Factors], exact: dict[str, Tensor], rank: int, given: Options
) -> Took:
    stack = []
    for name, strength in STRENGTHS.items():
        tensors = {}
        for layer, (up, down) in sides[name].items():
            tensors[f"{layer}.lora_up.weight"] = up
            tensors[f"{layer}.lora_down.weight"] = down
        stack.append((lorakit.load_lora(tensors), strength))
    compute = lorakit.Compute.of(device=given.device, threads=given.threads)
    rule = lorakit.RankRule(rank=rank)
    (merged, _), seconds = timed(lambda: lorakit.merge(stack, rule=rule, compute=compute))
    return Took(seconds=seconds, error=lora_error(merged, exact))


def _model(sides: dict[str, Factors], shapes: dict[str, tuple[int, int]], rank: int) -> Any:
    peft = import_module(PACKAGE)
    layers = {layer: nn.Linear(n, m, bias=False) for layer, (m, n) in shapes.items()}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(shapes))
    first, *others = STRENGTHS
    model = peft.get_peft_model(nn.ModuleDict(layers), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name in STRENGTHS:
            for layer, (up, down) in sides[name].items():
                wrapped = model.base_model.model[layer]
                wrapped.lora_A[name].weight.copy_(down)
                wrapped.lora_B[name].weight.copy_(up)
    return model


def _peft(model: Any, exact: dict[str, Tensor], rank: int, full_matrices: bool) -> Took:
    def merge() -> None:
        # An adapter that is there already would be left as it is.
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(
            list(STRENGTHS),
            list(STRENGTHS.values()),
            "merged",
            combination_type="svd",
            svd_rank=rank,
            svd_full_matrices=full_matrices,
        )

    with torch.no_grad():
        _, seconds = timed(merge)
        layers = model.base_model.model
        pairs = [
            (layers[layer].get_delta_weight("merged"), delta) for layer, delta in exact.items()
        ]
        return Took(seconds=seconds, error=error(pairs))
