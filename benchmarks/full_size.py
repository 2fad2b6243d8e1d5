"""Full-size files with real names, made once and kept in .cache/bench."""

from collections.abc import Callable
from pathlib import Path

import synthetic

from benchmarks import ROOT, flux, process
from benchmarks.options import Options

FOLDER = ROOT / ".cache" / "bench"
TUNING = synthetic.Tuning(rank=64)


def checkpoint(architecture: str, *, factor: int = 1, tuned: bool = False) -> Path:
    """Return a checkpoint (sd1 2.1 GB, sdxl 6.9 GB in fp16, flux 24 GB in bf16), perhaps tuned.

    The tuned Flux is the plain one with a LoRA baked in: a third file of its size is too much.
    """
    name = f"{architecture}{'-tuned' if tuned else ''}"

    def write(path: Path) -> None:
        if architecture == "flux" and tuned:
            plain, change = checkpoint("flux", factor=factor), lora("flux", 32, factor=factor)
            out = Path(f"{path}.safetensors")
            process.lorakit("merge", change, "--into", plain, "-o", out, given=Options())
            out.replace(path)
            return
        if architecture == "flux":
            flux.write_checkpoint(path, factor=factor)
            return
        tensors = synthetic.single_file(architecture, factor=factor)
        synthetic.write_checkpoint(path, tensors, tuning=TUNING if tuned else None)

    return _cached(name, factor, write)


def lora(architecture: str, rank: int, *, factor: int = 1, seed: int = 0) -> Path:
    """Return a kohya LoRA in the checkpoint's dtype, with text encoders but for Flux."""

    def write(path: Path) -> None:
        if architecture == "flux":
            synthetic.write_lora(path, flux.lora_tensors(rank=rank, seed=seed, factor=factor))
            return
        tensors = synthetic.lora_tensors(
            architecture, rank=rank, alpha=rank / 2, seed=seed, factor=factor
        )
        metadata = synthetic.lora_metadata(architecture, rank=rank, alpha=rank / 2)
        synthetic.write_lora(path, tensors, metadata)

    return _cached(f"{architecture}-lora-{rank}-seed{seed}", factor, write)


def output(name: str) -> Path:
    """Return a path for a result, with nothing there."""
    path = FOLDER / f"out-{name}.safetensors"
    path.unlink(missing_ok=True)
    return path


def _cached(name: str, factor: int, write: Callable[[Path], None]) -> Path:
    small = f"-small{factor}" if factor > 1 else ""
    path = FOLDER / f"{name}{small}.safetensors"
    if not path.exists():
        print(f"making {path.name}", flush=True)
        half_made = path.with_suffix(".tmp")
        write(half_made)
        half_made.replace(path)
    return path
