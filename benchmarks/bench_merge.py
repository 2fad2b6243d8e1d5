"""`merge` of two LoRAs into one, against reading, the least products, and writing the result."""

import torch

from benchmarks import full_size, measure, process, truth
from benchmarks.options import Options

RANKS = (32, 128)
STRENGTHS = (0.8, -0.5)
KEPT = 32
STORED = 2.0**-8
"""What two factors stored in fp16 or bf16 may change of a ΔW, relative."""
MOST = 1.001
"""Times the error of the best of that rank."""


def run(given: Options) -> bool:
    """Merge ranks 32 and 128 without loss, then at rank 32; measure the error of the sum."""
    files = [
        full_size.lora(given.architecture, rank, factor=given.factor, seed=seed)
        for seed, rank in enumerate(RANKS)
    ]
    layers = truth.layers(given.architecture, factor=given.factor)
    sample = truth.spread(layers, given.samples)
    terms = [(truth.File(path), strength) for path, strength in zip(files, STRENGTHS, strict=True)]
    exact = {layer: truth.total(terms, layer) for layer in sample}
    stack = [f"{path}:{strength}" for path, strength in zip(files, STRENGTHS, strict=True)]
    right = True
    rate = measure.gemm_rate(width=sum(RANKS), dtype=torch.float64)
    for title, kept, rank in (
        ("exact", sum(RANKS), []),
        (f"at rank {KEPT}", KEPT, ["--rank", str(KEPT)]),
    ):
        out = full_size.output("merge")
        measure.as_asked(given, *files)
        took = process.lorakit("merge", *stack, *rank, "-o", out, given=given)
        measure.as_asked(given, *files)
        moving = measure.read_all(*files) + measure.copy_and_sync(out, full_size.FOLDER)
        multiplying = truth.reduction_flops(layers, rank=sum(RANKS), kept=kept) / rate
        size = sum(path.stat().st_size for path in files)
        name = f"reading and writing {moving:.2f} s and products {multiplying:.2f} s, together"
        measure.show(title, took, limit=moving + multiplying, limit_name=name, size=size)
        merged = truth.File(out)
        found = {layer: merged.delta(layer) for layer in sample}
        if rank:
            excess = truth.excess(found, exact, KEPT)
            print(f"  {len(sample)} layers: {excess}")
            right &= excess.worst <= MOST
        else:
            worst = max(truth.relative_error(found[layer], exact[layer]) for layer in sample)
            print(f"  {len(sample)} layers: largest relative error {worst:.2e}, as stored")
            right &= worst <= STORED
    return right
