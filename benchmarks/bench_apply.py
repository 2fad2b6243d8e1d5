"""`merge --into`: a LoRA baked into a checkpoint, against copying that checkpoint."""

import sys

from benchmarks import full_size, measure, options, truth


def main(arguments: list[str] | None = None) -> None:
    """Bake two LoRAs of rank 32 at 0.7 and -0.4; check the result element by element."""
    given = options.parse(__doc__, "sdxl", arguments)
    base = full_size.checkpoint(given.architecture, factor=given.factor)
    size = base.stat().st_size
    layers = truth.layers(given.architecture, factor=given.factor)
    touched = frozenset(layer.key for layer in layers)
    first = full_size.lora(given.architecture, 32, factor=given.factor)
    second = full_size.lora(given.architecture, 32, factor=given.factor, seed=1)
    failed = False
    for title, loras in (("one LoRA", {first: 0.8}), ("two LoRAs", {first: 0.7, second: -0.4})):
        out = full_size.output("apply")
        limit = measure.copy_and_sync(base, full_size.FOLDER)
        stack = [f"{path}:{strength}" for path, strength in loras.items()]
        took = measure.lorakit("merge", *stack, "--into", base, "-o", out, threads=given.threads)
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
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    print(measure.versions())
    main()
