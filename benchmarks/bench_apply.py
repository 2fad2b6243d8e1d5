"""`merge --into`: a LoRA baked into a checkpoint, against copying that checkpoint."""

from benchmarks import full_size, measure, process, truth
from benchmarks.options import Options


def run(given: Options) -> bool:
    """Bake two LoRAs of rank 32 at 0.7 and -0.4; check the result element by element."""
    base = full_size.checkpoint(given.architecture, factor=given.factor)
    size = base.stat().st_size
    layers = truth.layers(given.architecture, factor=given.factor)
    touched = frozenset(layer.key for layer in layers)
    first = full_size.lora(given.architecture, 32, factor=given.factor)
    second = full_size.lora(given.architecture, 32, factor=given.factor, seed=1)
    failed = False
    for title, loras in (("one LoRA", {first: 0.8}), ("two LoRAs", {first: 0.7, second: -0.4})):
        out = full_size.output("apply")
        measure.as_asked(given, base)
        limit = measure.copy_and_sync(base, full_size.FOLDER)
        stack = [f"{path}:{strength}" for path, strength in loras.items()]
        measure.as_asked(given, base, *loras)
        took = process.lorakit("merge", *stack, "--into", base, "-o", out, given=given)
        measure.show(title, took, limit=limit, limit_name="copy and sync", size=size)
        wrong = truth.inexact(base, out, loras, truth.spread(layers, given.samples))
        wrong += truth.changed_elsewhere(base, out, touched)
        print(
            f"  {min(given.samples, len(layers))} of {len(layers)} layers equal the float64 sum "
            f"rounded once, all other tensors byte-identical: {'no' if wrong else 'yes'}"
        )
        print("".join(f"    {line}\n" for line in wrong[:5]), end="")
        failed |= bool(wrong)
        out.unlink()
    return not failed
