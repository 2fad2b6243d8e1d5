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
        "inspect --blocks style.safetensors line-art.safetensors",
    ),
    (
        "Copy machine, step 1: bake a LoRA into the checkpoint. Nothing else in the file changes.",
        "merge style.safetensors:0.8 --into base.safetensors -o base-style.safetensors --verify",
    ),
    (
        "Several LoRAs become one; the sum is exact, whatever their ranks, alphas and dialects.",
        "merge style.safetensors:0.8 line-art.safetensors:-0.5 -o stack.safetensors --verify",
    ),
    (
        "Copy machine, step 2: the difference of two models as a LoRA.",
        "extract base.safetensors tuned.safetensors --rank 8 --conv-rank 8"
        " -o difference.safetensors --verify",
    ),
    (
        "The difference of two LoRAs needs no model and loses nothing.",
        "extract line-art.safetensors style.safetensors -o style-minus-line-art.safetensors"
        " --verify",
    ),
    (
        "A smaller rank: the best one there is, straight from the factors.",
        "resize stack.safetensors --energy 0.95 --rank 8 -o small.safetensors --verify",
    ),
    (
        "Only the output blocks: deleted layers make the file smaller.",
        "cut-blocks style.safetensors --preset OUTALL -o style-out.safetensors --verify",
    ),
)


def make_models() -> None:
    """Write a checkpoint, a fine-tuned one, and two LoRAs in two dialects."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    tensors = synthetic.single_file("sdxl", factor=FACTOR)
    synthetic.write_checkpoint(FOLDER / "base.safetensors", tensors)
    synthetic.write_tuned(FOLDER / "tuned.safetensors", tensors, tuning=synthetic.Tuning(rank=8))
    for name, dialect, rank, seed in (
        ("style", "kohya", 8, 1),
        ("line-art", "diffusers", 4, 2),
    ):
        lora = synthetic.lora_tensors(
            "sdxl", dialect=dialect, rank=rank, alpha=rank / 2, seed=seed, factor=FACTOR
        )
        metadata = synthetic.lora_metadata("sdxl", rank=rank, alpha=rank / 2)
        synthetic.write_lora(FOLDER / f"{name}.safetensors", lora, metadata)


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
    make_models()
    for file in sorted(FOLDER.iterdir()):
        print(f"  {file.stat().st_size / 1e6:5.1f} MB  {file.name}")
    for sentence, line in STORY:
        print(f"\n# {sentence}")
        run(line)
    print(f"\nAll done. The files are in {FOLDER.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
