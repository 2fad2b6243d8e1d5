"""`resize` of a LoRA, against reading it and writing the result."""

from benchmarks import full_size, measure, options, truth

WIDE, NARROW = 128, 32


def main(arguments: list[str] | None = None) -> None:
    """Resize rank 128 to 32; compare the error with the best of that rank."""
    given = options.parse(__doc__, "sdxl", arguments)
    wide = full_size.lora(given.architecture, WIDE, factor=given.factor, seed=1)
    out = full_size.output("resize")
    rank = ("--rank", str(NARROW))
    took = measure.lorakit("resize", wide, *rank, "-o", out, threads=given.threads)
    limit = measure.read_all(wide) + measure.copy_and_sync(out, full_size.FOLDER)
    measure.show(
        f"resize {WIDE} to {NARROW}",
        took,
        limit=limit,
        limit_name="reading and writing",
        size=wide.stat().st_size,
    )
    layers = truth.layers(given.architecture, factor=given.factor)
    sample = truth.spread(layers, given.samples)
    before, after = truth.File(wide), truth.File(out)
    exact = {layer: before.delta(layer) for layer in sample}
    found = {layer: after.delta(layer) for layer in sample}
    print(f"  {len(sample)} layers: {truth.excess(found, exact, NARROW)}")


if __name__ == "__main__":
    print(measure.versions())
    main()
