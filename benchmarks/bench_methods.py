"""Merge methods on three LoRAs: into one LoRA, and into the checkpoint by full-space ties."""

import time
from pathlib import Path

import torch

from benchmarks import full_size, measure, process, truth
from benchmarks.layer import Layer
from benchmarks.options import Options

STRENGTHS = (0.8, 0.6, -0.5)
METHODS = ("linear", "ties", "dare-ties", "karcher", "tsv", "iso-c", "ctm")


def run(given: Options) -> bool:
    """Merge three LoRAs of rank 32 by several methods; show time, memory and the limits."""
    files = [
        full_size.lora(given.architecture, 32, factor=given.factor, seed=seed) for seed in range(3)
    ]
    stack = [f"{path}:{strength}" for path, strength in zip(files, STRENGTHS, strict=True)]
    size = sum(path.stat().st_size for path in files)
    for method in METHODS:
        out = full_size.output("methods")
        took = process.lorakit(
            "merge", *stack, "--method", method, "--rank", "32", "-o", out, given=given
        )
        limit = measure.read_all(*files) + measure.copy_and_sync(out, full_size.FOLDER)
        name = "reading and writing"
        measure.show(f"{method} at rank 32", took, limit=limit, limit_name=name, size=size)
        out.unlink()
    base = full_size.checkpoint(given.architecture, factor=given.factor)
    forming = formed(files, truth.layers(given.architecture, factor=given.factor))
    copying = measure.copy_and_sync(base, full_size.FOLDER)
    print(f"  forming the dense deltas once {forming:.2f} s, copy and sync {copying:.2f} s")
    for method in ("linear", "ties"):
        out = full_size.output("methods")
        took = process.lorakit(
            "merge", *stack, "--method", method, "--into", base, "-o", out, given=given
        )
        measure.show(
            f"{method} into the checkpoint",
            took,
            limit=forming + copying,
            limit_name="forming the deltas, and copy and sync",
            size=base.stat().st_size,
        )
        out.unlink()
    return True


def formed(files: list[Path], layers: list[Layer]) -> float:
    """Return the seconds that up @ down of every layer and LoRA takes, on all cores, in fp32."""
    opened = [truth.File(path) for path in files]
    seconds = 0.0
    for layer in layers:
        for file in opened:
            up, down = (factor.float() for factor in file.factors(layer))
            start = time.perf_counter()
            torch.mm(up, down)
            seconds += time.perf_counter() - start
    return seconds
