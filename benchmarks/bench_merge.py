"""`merge` of two LoRAs into one, against reading them and writing the result."""

from benchmarks import full_size, measure, options, truth

STRENGTHS = (0.8, -0.5)


def main(arguments: list[str] | None = None) -> None:
    """Merge ranks 32 and 128 without loss, then at rank 32; measure the error of the sum."""
    given = options.parse(__doc__, "sdxl", arguments)
    files = (
        full_size.lora(given.architecture, 32, factor=given.factor),
        full_size.lora(given.architecture, 128, factor=given.factor, seed=1),
    )
    layers = truth.layers(given.architecture, factor=given.factor)
    sample = truth.spread(layers, given.samples)
    terms = [(truth.File(path), strength) for path, strength in zip(files, STRENGTHS, strict=True)]
    exact = {layer: truth.total(terms, layer) for layer in sample}
    stack = [f"{path}:{strength}" for path, strength in zip(files, STRENGTHS, strict=True)]
    for title, rank in (("exact", []), ("at rank 32", ["--rank", "32"])):
        out = full_size.output("merge")
        took = measure.lorakit("merge", *stack, *rank, "-o", out, threads=given.threads)
        limit = measure.read_all(*files) + measure.copy_and_sync(out, full_size.FOLDER)
        size = sum(path.stat().st_size for path in files)
        measure.show(title, took, limit=limit, limit_name="reading and writing", size=size)
        merged = truth.File(out)
        found = {layer: merged.delta(layer) for layer in sample}
        if rank:
            print(f"  {len(sample)} layers: {truth.excess(found, exact, 32)}")
        else:
            worst = max(truth.relative_error(found[layer], exact[layer]) for layer in sample)
            print(f"  {len(sample)} layers: largest relative error {worst:.2e} (stored as fp16)")


if __name__ == "__main__":
    print(measure.versions())
    main()
