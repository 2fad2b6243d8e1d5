"""What all recipes need: planted LoRAs, the command line, and a measure that knows no lorakit.

A planted LoRA is a seeded change of low rank with a real model's names, its widths divided by 32.
The truth is known, so a recipe can say how near its result comes. All files lie in the current
folder and are called without their ending.
"""

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from safetensors import safe_open
from torch import Tensor

from lorakit.cli import lorakit as command_line

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))
import synthetic  # noqa: E402

FACTOR = 32
Deltas = dict[str, Tensor]
"""The change of each layer, [out, in · kernel] in float64, by the layer's diffusers path."""
Found = dict[str, float]
"""What a recipe measured."""


def lorakit(line: str, *, status: int = 0) -> None:
    """Echo a command and run it; leave if it does not end with this status."""
    print(f"$ lorakit {line}", flush=True)
    ended = 0
    try:
        command_line.main(shlex.split(line), prog_name="lorakit", standalone_mode=False)
    except click.ClickException as error:
        print(f"lorakit: {error.message}")
        ended = error.exit_code
    if ended != status:
        sys.exit(f"expected status {status}, found {ended}")


def serve(cook: Callable[[], Found]) -> None:
    """Run a recipe in a fresh folder under .cache/recipes and say what it measured."""
    folder = EXAMPLES.parent / ".cache" / "recipes" / Path(sys.argv[0]).stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    measured(cook())


def measured(found: Found) -> None:
    """Print what was measured, a line each."""
    for what, value in found.items():
        print(f"# {what}: {value:.3g}")


def checkpoint(name: str, architecture: str = "sd1") -> None:
    """Write a small checkpoint in fp16."""
    layout = synthetic.single_file(architecture, factor=FACTOR)
    synthetic.write_checkpoint(_file(name), layout)


def fine_tune(name: str, *, seed: int, rank: int, noise: float, norms: bool = False) -> None:
    """Write the SD 1.5 checkpoint after a seeded change of this rank, and some of full rank.

    Args:
        name: of the file.
        seed: of the change.
        rank: of most of it, which is about 1 % of the weights.
        noise: what else every weight moves, relative to the weights.
        norms: biases and norms move too.
    """
    layout = synthetic.single_file("sd1", factor=FACTOR)
    tuning = synthetic.Tuning(seed=seed, rank=rank, noise=noise, norms=norms)
    synthetic.write_checkpoint(_file(name), layout, tuning=tuning)


def plant(
    name: str,
    *,
    seed: int,
    rank: int = 4,
    alpha: float | None = None,
    architecture: str = "sd1",
    dialect: str = "kohya",
    text: bool = True,
    only: str = "",
    dead: str = "",
) -> None:
    """Write a LoRA of a seeded change of about 1 % of the weights.

    Args:
        name: of the file.
        seed: of the change; two seeds have next to nothing in common.
        rank: of every layer.
        alpha: as it is stored, the rank if left out; the change is the same.
        architecture: sd1, sd2 or sdxl.
        dialect: kohya, kohya-diffusers, diffusers or comfyui.
        text: text encoders too.
        only: a regular expression that the names of the layers must match.
        dead: of layers whose `up` is zero, as trainers leave those that they never reached.
    """
    tensors = synthetic.lora_tensors(
        architecture,
        dialect=dialect,
        rank=rank,
        alpha=alpha,
        seed=seed,
        te=text,
        factor=FACTOR,
    )
    chosen = {key: tensor for key, tensor in tensors.items() if re.search(only, key)}
    if dead:
        ups = [key for key in chosen if re.search(dead, key) and ".lora_up." in key]
        chosen |= {key: torch.zeros_like(chosen[key]) for key in ups}
    metadata = synthetic.lora_metadata(architecture, rank=rank, alpha=alpha)
    synthetic.write_lora(_file(name), chosen, metadata)


def train(name: str, parts: Mapping[str, float], *, rank: int, architecture: str = "sd1") -> None:
    """Write what a training finds that learns all these parts at once: one LoRA of one rank."""
    learnt = total(parts, architecture)
    tensors = {}
    for module in synthetic.modules(architecture, factor=FACTOR):
        delta = learnt.get(_path(module))
        if delta is None:
            continue
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
        up, down = left * sigma.sqrt(), sigma.sqrt()[:, None] * right
        up, down = up[:, :rank].half(), down[:rank].half()
        if len(module.shape) == 4:
            up, down = up[:, :, None, None], down.reshape(-1, *module.shape[1:])
        stem = synthetic.spelled(module, architecture, "kohya")
        tensors[f"{stem}.lora_up.weight"] = up.contiguous()
        tensors[f"{stem}.lora_down.weight"] = down.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(down.shape[0]))
    synthetic.write_lora(_file(name), tensors, synthetic.lora_metadata(architecture, rank=rank))


def deltas(name: str, architecture: str = "sd1") -> Deltas:
    """Return alpha / rank · up · down of each layer of a LoRA, whatever its dialect."""
    tensors, found = tensors_of(name), {}
    for module in synthetic.modules(architecture, factor=FACTOR):
        for stem in {synthetic.spelled(module, architecture, d) for d in synthetic.DIALECTS}:
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if f"{stem}.{up}.weight" in tensors:
                    ups = tensors[f"{stem}.{up}.weight"].double().flatten(1)
                    downs = tensors[f"{stem}.{down}.weight"].double().flatten(1)
                    alpha = float(tensors.get(f"{stem}.alpha", torch.tensor(len(downs))))
                    found[_path(module)] = alpha / len(downs) * (ups @ downs)
    return found


def total(parts: Mapping[str, float], architecture: str = "sd1") -> Deltas:
    """Return Σ strength · ΔW of these LoRAs."""
    summed: Deltas = {}
    for name, strength in parts.items():
        for layer, delta in deltas(name, architecture).items():
            summed[layer] = summed.get(layer, torch.zeros_like(delta)) + strength * delta
    return summed


def times(change: Deltas, strength: float) -> Deltas:
    """Return a change at a strength."""
    return {layer: strength * delta for layer, delta in change.items()}


def between(original: str, tuned: str, architecture: str = "sd1") -> Deltas:
    """Return TUNED − ORIGINAL of two checkpoints in the layers that a LoRA can have."""
    before, after, found = tensors_of(original), tensors_of(tuned), {}
    for module in synthetic.modules(architecture, factor=FACTOR):
        place = module.place
        start, stop = synthetic.row_range(place, tuple(before[place.key].shape))
        change = after[place.key].double() - before[place.key].double()
        found[_path(module)] = change[start:stop].flatten(1)
    return found


def tensors_of(name: str) -> dict[str, Tensor]:
    """Return all tensors of a file."""
    with safe_open(_file(name), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def inner(one: Deltas, other: Deltas) -> float:
    """Return the inner product over all layers together."""
    return math.fsum(float((one[k] * other[k]).sum()) for k in one.keys() & other.keys())


def norm(change: Deltas) -> float:
    """Return the Frobenius norm over all layers together."""
    return math.sqrt(inner(change, change))


def cosine(one: Deltas, other: Deltas) -> float:
    """Return the cosine of the angle between two changes."""
    return inner(one, other) / (norm(one) * norm(other))


def error(found: Deltas, truth: Deltas) -> float:
    """Return ‖found − truth‖ / ‖truth‖; a layer that is missing counts as zero."""
    layers = found.keys() | truth.keys()
    off = {k: found.get(k, torch.zeros(())) - truth.get(k, torch.zeros(())) for k in layers}
    return norm(off) / norm(truth)


def _path(module: synthetic.Module) -> str:
    return f"{module.component}.{module.path}"


def _file(name: str) -> Path:
    return Path(f"{name}.safetensors")
