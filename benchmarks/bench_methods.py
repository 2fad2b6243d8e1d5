"""Merge methods on three LoRAs: into one LoRA, and into the checkpoint by full-space ties."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import full_size, measure, process, truth
from benchmarks.layer import Layer
from benchmarks.options import Options

MOST = 1.001
"""Times the error of the best of that rank."""
STRENGTHS = (0.8, 0.6, -0.5)
KEPT = 32
METHODS = ("linear", "ties", "dare-ties", "karcher", "tsv", "iso-c", "ctm")
Stack = Mapping[Path, float]


def run(given: Options) -> bool:
    """Merge three LoRAs of rank 32 by several methods; show time, memory and the limits.

    What the sum must be is checked; other methods are checked for what they leave alone.
    """
    stack = {
        full_size.lora(given.architecture, 32, factor=given.factor, seed=seed): strength
        for seed, strength in enumerate(STRENGTHS)
    }
    layers = truth.layers(given.architecture, factor=given.factor)
    right = [_into_lora(method, stack, layers, given) for method in METHODS]
    base = full_size.checkpoint(given.architecture, factor=given.factor)
    forming, copying = formed(list(stack), layers), measure.copy_and_sync(base, full_size.FOLDER)
    print(f"  forming the dense deltas once {forming:.2f} s, copy and sync {copying:.2f} s")
    limit = forming + copying
    right += [_into(base, method, stack, layers, limit, given) for method in ("linear", "ties")]
    return all(right)


def _into_lora(method: str, stack: Stack, layers: list[Layer], given: Options) -> bool:
    out = full_size.output("methods")
    how = ("--method", method, "--rank", str(KEPT))
    took = process.lorakit("merge", *_named(stack), *how, "-o", out, given=given)
    measure.show(
        f"{method} at rank {KEPT}",
        took,
        limit=measure.read_all(*stack) + measure.copy_and_sync(out, full_size.FOLDER),
        limit_name="reading and writing",
        size=sum(path.stat().st_size for path in stack),
    )
    if method != "linear":
        return True
    sample = truth.spread(layers, given.samples)
    terms, merged = [(truth.File(path), s) for path, s in stack.items()], truth.File(out)
    exact = {layer: truth.total(terms, layer) for layer in sample}
    excess = truth.excess({layer: merged.delta(layer) for layer in sample}, exact, KEPT)
    print(f"  {len(sample)} layers: {excess}")
    return excess.worst <= MOST


def _into(
    base: Path, method: str, stack: Stack, layers: list[Layer], limit: float, given: Options
) -> bool:
    out = full_size.output("methods")
    took = process.lorakit(
        "merge", *_named(stack), "--method", method, "--into", base, "-o", out, given=given
    )
    measure.show(
        f"{method} into the checkpoint",
        took,
        limit=limit,
        limit_name="forming the deltas, and copy and sync",
        size=base.stat().st_size,
    )
    wrong = truth.changed_elsewhere(base, out, frozenset(layer.key for layer in layers))
    if method == "linear":
        wrong += truth.inexact(base, out, stack, truth.spread(layers, given.samples))
    print("".join(f"    {line}\n" for line in wrong[:5]), end="")
    out.unlink()
    return not wrong


def _named(stack: Stack) -> list[str]:
    return [f"{path}:{strength}" for path, strength in stack.items()]


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
