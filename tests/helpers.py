"""Small steps that many tests take.

Bytes of files are compared as `assert bool(a == b)`: pytest would take minutes to show where
they differ.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from click.testing import CliRunner, Result
from realnames import trainable_keys
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from lorakit.cli import lorakit
from lorakit.lorafile import LoraFile, load_lora
from tests import reference

FP16 = 1e-3
"""Two factors rounded to fp16: 2^-11 / √3 each at the most, 4e-4 together, with room."""
FP32 = 2e-6
"""Sums in fp32 over ranks below 128."""


needs_maps = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has mapped"
)


def mappings() -> list[str]:
    """What this process has mapped, a line each, as the kernel lists it."""
    return os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()


def lies_in(tensor: Tensor, file: Path) -> bool:
    """Whether a tensor's bytes are the file's own pages, as the kernel lists them."""
    spans = (
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in mappings()
        if line.endswith(f" {file}")
    )
    return any(start <= tensor.data_ptr() < stop for start, stop in spans)


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def few(tensors: dict[str, Tensor], *, every: int = 5) -> dict[str, Tensor]:
    """Keep one module in `every`, of all blocks and of the text encoders."""
    modules = sorted({key.partition(".lora_")[0].removesuffix(".alpha") for key in tensors})
    kept = set(modules[::every])
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key.partition(".lora_")[0].removesuffix(".alpha") in kept
    }


def slim_layout(architecture: str, *, factor: int = 32) -> dict[str, tuple[int, ...]]:
    """Return the layout of a single file with one in eight of the tensors that no LoRA changes."""
    layout, changed = synthetic.single_file(architecture, factor=factor), trainable_keys()
    kept = {*changed, *[key for key in layout if key not in changed][::8]}
    return {key: shape for key, shape in layout.items() if key in kept}


def slim(base: Path, tuned: Path, *, every: int = 3) -> Path:
    """Leave in `tuned` one changed tensor in `every`; the others are again as in `base`."""
    # Not mapped into memory: the file is written over.
    before, after = (load(path.read_bytes()) for path in (base, tuned))
    changed = [key for key in sorted(before) if not torch.equal(before[key], after[key])]
    return synthetic.write_lora(tuned, before | {key: after[key] for key in changed[::every]})


def dense(lora: LoraFile | Path) -> dict[str, Tensor]:
    """Return each module's ΔW in float64, from the stored tensors, by the plain formula."""
    file = load_lora(lora) if isinstance(lora, Path) else lora
    found = {}
    for module, adapter in file.adapters.items():
        parts = adapter.tensors()
        delta = reference.delta(parts["up"], parts["down"], float(parts["alpha"]), parts.get("mid"))
        found[module] = delta.flatten(1)
    return found


def total_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the relative error over all modules together; a missing module counts as zero."""
    off = [found.get(name, torch.zeros_like(value)) - value for name, value in expected.items()]
    off += [value for name, value in found.items() if name not in expected]
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    return float(torch.stack([value.norm() for value in off]).norm() / norm)


def worst_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative error of a module; the modules must be the same."""
    assert found.keys() == expected.keys()
    return max(reference.relative_error(found[name], expected[name]) for name in expected)


def weighted(terms: list[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Return Σ strength · ΔW by module in float64."""
    total: dict[str, Tensor] = {}
    for deltas, strength in terms:
        for module, delta in deltas.items():
            total[module] = total.get(module, torch.zeros_like(delta)) + strength * delta
    return total


def run(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(lorakit, [str(argument) for argument in arguments])


def ran(*arguments: object) -> dict[str, Any]:
    """Run a command with --json; it must succeed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(*arguments: object, status: int = 1) -> str:
    """Run a command that must be refused with one sentence; return the sentence."""
    result = run(*arguments)
    assert result.exit_code == status, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    sentence = getattr(result.exception, "message", None) or result.output
    return str(sentence)
