"""`resize` of a LoRA, against reading it, the least products, and writing the result."""

from benchmarks import full_size, measure, process, truth
from benchmarks.options import Options

WIDE, NARROW = 128, 32
MOST = 1.001
"""Times the error of the best of that rank: the result is exact but for its storing in fp16."""


def run(given: Options) -> bool:
    """Resize rank 128 to 32; compare the error with the best of that rank."""
    wide = full_size.lora(given.architecture, WIDE, factor=given.factor, seed=1)
    out = full_size.output("resize")
    rank = ("--rank", str(NARROW))
    measure.as_asked(given, wide)
    took = process.lorakit("resize", wide, *rank, "-o", out, given=given)
    layers = truth.layers(given.architecture, factor=given.factor)
    measure.as_asked(given, wide)
    moving = measure.read_all(wide) + measure.copy_and_sync(out, full_size.FOLDER)
    rate = measure.gemm_rate(width=WIDE)
    multiplying = truth.reduction_flops(layers, rank=WIDE, kept=NARROW) / rate
    measure.show(
        f"resize {WIDE} to {NARROW}",
        took,
        limit=moving + multiplying,
        limit_name=f"reading and writing {moving:.2f} s and products {multiplying:.2f} s, together",
        size=wide.stat().st_size,
    )
    sample = truth.spread(layers, given.samples)
    before, after = truth.File(wide), truth.File(out)
    exact = {layer: before.delta(layer) for layer in sample}
    found = {layer: after.delta(layer) for layer in sample}
    excess = truth.excess(found, exact, NARROW)
    print(f"  {len(sample)} layers: {excess}")
    return excess.worst <= MOST
