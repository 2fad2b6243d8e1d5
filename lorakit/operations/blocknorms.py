"""The norm, the share of the energy and the effective rank of each block of a LoRA."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.compute import Compute, ordered_map
from lorakit.linalg.factored import svd
from lorakit.lorafile import LoraFile, load_lora
from lorakit.operations.inspect import Block, Inspection


def block_norms(found: Inspection, place: Path) -> Inspection:
    """Read the LoRA and fill in what its blocks do."""
    lora = load_lora(place, allow_unmatched=True)
    modules = list(lora.adapters)
    spectra = ordered_map(
        lambda module: _strength(lora.adapters[module]), modules, compute=Compute.of(device="cpu")
    )
    measured = dict(zip(modules, spectra, strict=True))
    whole = math.fsum(norm**2 for norm, _ in measured.values() if not math.isnan(norm))
    return replace(
        found,
        blocks=tuple(_filled(block, lora, measured, whole) for block in found.blocks),
        dead=tuple(module for module in modules if measured[module][0] == 0.0),
        unmeasured=tuple(module for module in modules if math.isnan(measured[module][0])),
    )


def _strength(adapter: Adapter) -> tuple[float, float]:
    """Return ‖ΔW‖ and ‖ΔW‖² / σ₁², both 0 for a dead layer, and NaN where a base is needed."""
    if adapter.needs_base:
        return math.nan, math.nan
    change = adapter.change()
    if isinstance(change, Tensor):
        sigma = torch.linalg.eigvalsh(_gram(change)).clamp(min=0).sqrt().flip(0)
    else:
        sigma = svd(change).s
    energy = float((sigma**2).sum())
    if energy == 0.0:
        return 0.0, 0.0
    return math.sqrt(energy), energy / float(sigma[0]) ** 2


def _gram(change: Tensor) -> Tensor:
    matrix = change.double().reshape(len(change), -1)
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return wide @ wide.T


def _filled(
    block: Block, lora: LoraFile, measured: dict[str, tuple[float, float]], whole: float
) -> Block:
    inside = [value for module, value in measured.items() if lora.block(module) == block.id]
    inside = [(norm, rank) for norm, rank in inside if not math.isnan(norm)]
    if not inside:
        return block
    energy = math.fsum(norm**2 for norm, _ in inside)
    alive = [rank for norm, rank in inside if norm]
    return replace(
        block,
        norm=math.sqrt(energy),
        share=energy / whole if whole else 0.0,
        effective_rank=math.fsum(alive) / len(alive) if alive else 0.0,
        dead=len(inside) - len(alive),
    )
