"""`extract` of two checkpoints, against reading both and the fewest products that do."""

from pathlib import Path

from benchmarks import full_size, measure, process, truth
from benchmarks.options import Options

RANK = 32
MOST = 1.01
"""Times the error of the best of that rank."""


def run(given: Options) -> bool:
    """Extract at rank 32, without and with convolutions; compare with the best of that rank."""
    original = full_size.checkpoint(given.architecture, factor=given.factor)
    tuned = full_size.checkpoint(given.architecture, factor=given.factor, tuned=True)
    kinds = {False: "linear layers"} | (
        {} if given.architecture == "flux" else {True: "all layers"}
    )
    right = [_extracted(original, tuned, given, name, conv) for conv, name in kinds.items()]
    return all(right)


def _extracted(original: Path, tuned: Path, given: Options, name: str, conv: bool) -> bool:
    layers = truth.layers(given.architecture, factor=given.factor, conv=conv)
    out = full_size.output("extract")
    measure.as_asked(given, original, tuned)
    reading = measure.read_all(original, tuned)
    product = 2 * truth.numel(layers) * RANK / measure.gemm_rate(width=RANK)
    ranks = ("--rank", str(RANK), *(("--conv-rank", str(RANK)) if conv else ()))
    measure.as_asked(given, original, tuned)
    took = process.lorakit("extract", original, tuned, *ranks, "-o", out, given=given)
    before, after, lora = truth.File(original), truth.File(tuned), truth.File(out)
    sample = truth.spread(layers, given.samples)
    exact = {layer: after.weight(layer) - before.weight(layer) for layer in sample}
    needed = [truth.products_within(delta, RANK, MOST) for delta in exact.values()]
    fewest = sum(needed) / len(needed)
    measure.show(
        f"extract {name} at rank {RANK}",
        took,
        limit=reading + fewest * product,
        limit_name=f"reading {reading:.2f} s and the {fewest:.1f} products of {product:.2f} s "
        f"that {MOST} times the best error takes, together",
        size=original.stat().st_size + tuned.stat().st_size,
    )
    found = {layer: lora.delta(layer) for layer in sample}
    excess = truth.excess(found, exact, RANK)
    print(f"  {len(sample)} layers: {excess}")
    return excess.worst <= MOST
