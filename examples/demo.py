"""Every command of lorakit on small models with SDXL's real names.

Run `make demo`, or `python examples/demo.py`; the files stay in .cache/demo to play with.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import synthetic
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "demo"
FACTOR = 32

STORY = (
    (
        "What is in a LoRA: read from the header alone.",
        "inspect style.safetensors",
    ),
    (
        "Where does it act? Kohya names and diffusers names side by side.",
        "inspect --blocks style.safetensors character.safetensors",
    ),
    (
        "Bake a LoRA into the checkpoint. Nothing else in the file changes.",
        "merge style.safetensors:0.8 --into base.safetensors -o out/baked.safetensors --verify",
    ),
    (
        "Several LoRAs become one; the sum is exact, whatever their ranks, alphas and dialects.",
        "merge style.safetensors:0.8 character.safetensors:-0.5 -o out/stack.safetensors --verify",
    ),
    (
        "The difference of two models as a LoRA.",
        "extract base.safetensors tuned.safetensors --rank 8 --conv-rank 8"
        " -o out/difference.safetensors --verify",
    ),
    (
        "The copy machine: two LoRAs, each overfitted on one image; the difference is the change.",
        "extract before.safetensors after.safetensors --rank 4 -o out/change.safetensors --verify",
    ),
    (
        "A smaller rank: the best one there is, straight from the factors.",
        "resize out/stack.safetensors --energy 0.95 --rank 8 -o out/small.safetensors --verify",
    ),
    (
        "Only the output blocks: deleted layers make the file smaller.",
        "cut-blocks style.safetensors --preset OUTALL -o out/style-out.safetensors --verify",
    ),
)


def make_models(folder: Path) -> None:
    """Write the files that README and tutorial name: two checkpoints, and four LoRAs."""
    tensors = synthetic.single_file("sdxl", factor=FACTOR)
    synthetic.write_checkpoint(folder / "base.safetensors", tensors)
    synthetic.write_tuned(folder / "tuned.safetensors", tensors, tuning=synthetic.Tuning(rank=8))
    image, change = lora(rank=8, seed=3), lora(rank=4, seed=4)
    for name, rank, alpha, factors in (
        ("style", 8, 4.0, lora(rank=8, alpha=4, seed=1)),
        ("character", 4, 2.0, lora(rank=4, seed=2, dialect="diffusers")),
        ("before", 8, 8.0, image),
        ("after", 12, 12.0, together(image, change)),
    ):
        metadata = synthetic.lora_metadata("sdxl", rank=rank, alpha=alpha)
        synthetic.write_lora(folder / f"{name}.safetensors", factors, metadata)


def lora(
    *, rank: int, seed: int, alpha: float | None = None, dialect: str = "kohya"
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA for the demo's model."""
    return synthetic.lora_tensors(
        "sdxl", dialect=dialect, rank=rank, alpha=alpha, seed=seed, factor=FACTOR
    )


def together(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one LoRA for two whose alpha is their rank: factors side by side."""
    sides = {"lora_up.weight": 1, "lora_down.weight": 0}
    joined = {}
    for key, tensor in one.items():
        side = sides.get(key.partition(".")[2])
        joined[key] = tensor + other[key] if side is None else torch.cat([tensor, other[key]], side)
    return joined


def run(line: str) -> None:
    """Echo a command line of lorakit and run it in the demo's folder; leave if it fails."""
    print(f"$ lorakit {line}", flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "lorakit", *line.split()]
    done = subprocess.run(command, cwd=FOLDER, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Make the models, then tell the story."""
    torch.set_num_threads(1)
    print(f"SDXL's real names, widths divided by {FACTOR}, in {FOLDER.relative_to(ROOT)}:")
    shutil.rmtree(FOLDER, ignore_errors=True)
    make_models(FOLDER)
    for file in sorted(FOLDER.iterdir()):
        print(f"  {file.stat().st_size / 1e6:5.1f} MB  {file.name}")
    for sentence, line in STORY:
        print(f"\n# {sentence}")
        run(line)
    print(f"\nAll done. The files are in {FOLDER.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
