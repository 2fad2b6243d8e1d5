"""`merge` of two LoRAs into one, against reading them and writing the result."""

from benchmarks import full_size, measure, process, truth
from benchmarks.options import Options

STRENGTHS = (0.8, -0.5)
STORED = 2.0**-8
"""What two factors stored in fp16 or bf16 may change of a ΔW, relative."""
MOST = 1.001
"""Times the error of the best of that rank."""


def run(given: Options) -> bool:
    """Merge ranks 32 and 128 without loss, then at rank 32; measure the error of the sum."""
    files = (
        full_size.lora(given.architecture, 32, factor=given.factor),
        full_size.lora(given.architecture, 128, factor=given.factor, seed=1),
    )
    layers = truth.layers(given.architecture, factor=given.factor)
    sample = truth.spread(layers, given.samples)
    terms = [(truth.File(path), strength) for path, strength in zip(files, STRENGTHS, strict=True)]
    exact = {layer: truth.total(terms, layer) for layer in sample}
    stack = [f"{path}:{strength}" for path, strength in zip(files, STRENGTHS, strict=True)]
    right = True
    for title, rank in (("exact", []), ("at rank 32", ["--rank", "32"])):
        out = full_size.output("merge")
        took = process.lorakit("merge", *stack, *rank, "-o", out, given=given)
        limit = measure.read_all(*files) + measure.copy_and_sync(out, full_size.FOLDER)
        size = sum(path.stat().st_size for path in files)
        measure.show(title, took, limit=limit, limit_name="reading and writing", size=size)
        merged = truth.File(out)
        found = {layer: merged.delta(layer) for layer in sample}
        if rank:
            excess = truth.excess(found, exact, 32)
            print(f"  {len(sample)} layers: {excess}")
            right &= excess.worst <= MOST
        else:
            worst = max(truth.relative_error(found[layer], exact[layer]) for layer in sample)
            print(f"  {len(sample)} layers: largest relative error {worst:.2e}, as stored")
            right &= worst <= STORED
    return right
