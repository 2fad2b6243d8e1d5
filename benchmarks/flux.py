"""Flux.1 at full size: 24 GB of seeded bf16 under the original names, and LoRAs for it."""

import math
from collections.abc import Mapping
from pathlib import Path

import seeded
import torch
from realnames import Shape, layout
from torch import Tensor

from benchmarks.layer import Layer

PREFIX = "model.diffusion_model."
BLOCKS = (f"{PREFIX}double_blocks.", f"{PREFIX}single_blocks.")
LEAST_WIDTH = 64
CHANGE = 0.01
"""‖ΔW‖ / ‖W‖ of a LoRA."""


def shapes(*, factor: int = 1) -> dict[str, Shape]:
    """Return the tensors of the single file, every width divided by `factor`."""
    return {
        key: tuple(max(1, size // factor) if size >= LEAST_WIDTH else size for size in shape)
        for key, shape in layout("flux1_dev_bfl").items()
    }


def layers(*, factor: int = 1) -> list[Layer]:
    """Return the linear layers of the blocks, under kohya's names."""
    return [
        Layer(name=_spelled(key), key=key, rows=(0, shape[0]), shape=shape)
        for key, shape in shapes(factor=factor).items()
        if len(shape) == 2 and key.startswith(BLOCKS)
    ]


def write_checkpoint(path: Path, *, factor: int = 1) -> None:
    """Write the model in bf16, a tensor in memory at a time."""
    specs = {key: ("BF16", shape) for key, shape in shapes(factor=factor).items()}
    seeded.write_file(
        path, specs, lambda key: seeded.weight(key, specs[key][1], seed=0, dtype="BF16")
    )


def lora_tensors(*, rank: int, seed: int, factor: int = 1) -> Mapping[str, Tensor]:
    """Return a LoRA of the blocks in bf16, with alpha half its rank."""
    tensors: dict[str, Tensor] = {}
    for layer in layers(factor=factor):
        up, down = seeded.factors(layer.name, *layer.shape, seed=seed, rank=rank)
        each = math.sqrt(CHANGE)
        tensors[f"{layer.name}.lora_up.weight"] = (2 * each * up).to(torch.bfloat16)
        tensors[f"{layer.name}.lora_down.weight"] = (each * down).to(torch.bfloat16)
        tensors[f"{layer.name}.alpha"] = torch.tensor(rank / 2)
    return tensors


def _spelled(key: str) -> str:
    path = key.removeprefix(PREFIX).removesuffix(".weight")
    return f"lora_unet_{path.replace('.', '_')}"
