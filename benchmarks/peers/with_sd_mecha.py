"""A LoRA baked into a checkpoint: sd-mecha, which streams too."""

from pathlib import Path

from benchmarks import full_size, process, truth
from benchmarks.options import Options
from benchmarks.peers.result import Compared, Took, error

PACKAGE = "sd-mecha"
STRENGTH = 0.8
ARCHITECTURES = ("sd1", "sdxl")


def compared(given: Options) -> list[Compared]:
    """Bake with both from the command line, so that each pays its start and its memory."""
    if given.factor > 1 or given.architecture not in ARCHITECTURES:
        print("  sd-mecha: knows SD 1.5 and SDXL at their true widths only")
        return []
    base = full_size.checkpoint(given.architecture)
    lora = full_size.lora(given.architecture, 32)
    out = full_size.output("peers")
    job = f"one LoRA of rank 32 into {given.architecture}"
    ours = process.lorakit("merge", f"{lora}:{STRENGTH}", "--into", base, "-o", out, given=given)
    took = Took(seconds=ours.seconds, error=_error(base, out, lora, given))
    out.unlink()
    script = ("-m", "benchmarks.peers.bake_by_sd_mecha")
    theirs = process.python(*script, base, lora, out, str(STRENGTH), given.architecture)
    if theirs.status:
        print(f"  sd-mecha: {job} failed: {theirs.errors.splitlines()[-1]}")
        return []
    peer = Took(seconds=theirs.seconds, error=_error(base, out, lora, given))
    out.unlink()
    memory = f"peak {ours.peak / 2**20:.0f} and {theirs.peak / 2**20:.0f} MiB"
    return [Compared(job=f"{job}, {memory}", ours=took, theirs=peer)]


def _error(base: Path, out: Path, lora: Path, given: Options) -> float:
    before, after, terms = truth.File(base), truth.File(out), [(truth.File(lora), STRENGTH)]
    layers = truth.spread(truth.layers(given.architecture), given.samples)
    return error(
        (after.weight(layer), before.weight(layer) + truth.total(terms, layer)) for layer in layers
    )
