"""Few file descriptors, little memory, many LoRAs, many modules."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit import load_lora
from lorakit.tensorfile.header import Spec, format_header
from tests.helpers import dense, ran, run, total_error, weighted

ROOT = Path(__file__).parents[2]
MIB = 2**20

pytest.importorskip("resource")


def limited(kind: str, amount: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that may take no more of something, once all is imported."""
    code = (
        "import resource, sys, lorakit.cli, lorakit.operations.merge, lorakit.operations.apply;"
        "import lorakit.operations.verify_model, lorakit.saving, torch;"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        f"limit = {amount}; resource.setrlimit(resource.RLIMIT_{kind}, (limit, limit));"
        "lorakit.cli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_hundred_loras_need_few_file_descriptors(made: Path, tmp_path: Path) -> None:
    """A hundred LoRAs, a model, and thirty files at once."""
    copies = [tmp_path / f"{number}.safetensors" for number in range(100)]
    for copy in copies:
        copy.hardlink_to(made / "a.safetensors")
    out = tmp_path / "out.safetensors"
    stack = [f"{copy}:0.01" for copy in copies]
    model = made / "base.safetensors"
    done = limited("NOFILE", "30", "merge", *stack, "--into", model, "-o", out, "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout


def test_a_hundred_loras_are_one_exact_sum(made: Path, tmp_path: Path) -> None:
    """Fifty of one and fifty of another, each at its own strength."""
    out = tmp_path / "out.safetensors"
    stack, terms = [], []
    for number in range(100):
        name = "ab"[number % 2]
        strength = 0.01 * (number - 30)
        copy = tmp_path / f"{name}{number}.safetensors"
        copy.hardlink_to(made / f"{name}.safetensors")
        stack.append(f"{copy}:{strength!r}")
        terms.append((load_lora(made / f"{name}.safetensors"), strength))
    ran("merge", *stack, "-o", out, "--dtype", "fp32", "--verify")
    sums = {name: sum(s for lora, s in terms if lora.name.endswith(f"{name}.safetensors"))
            for name in "ab"}  # fmt: skip
    exact = weighted([(dense(made / f"{name}.safetensors"), sums[name]) for name in "ab"])
    assert total_error(dense(out), exact) < 1e-5
    assert total_error(dense(out), {k: 0.9 * v for k, v in exact.items()}) > 0.05


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Make a model of 768 MiB, most of it holes that take no disk."""
    path = tmp_path / "large.safetensors"
    layer = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    specs = {f"first_stage_model.{n}": Spec("F16", (64 * MIB,)) for n in range(6)}
    specs[layer] = Spec("F16", (64, 64))
    header = format_header(specs, {})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    return path


def small(folder: Path) -> Path:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = folder / "small.safetensors"
    factors = {"lora_up.weight": torch.ones(64, 2), "lora_down.weight": torch.ones(2, 64)}
    save_file({f"{layer}.{role}": factor for role, factor in factors.items()}, file)
    return file


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures as Linux does")
def test_a_model_larger_than_the_memory_is_baked(large: Path, tmp_path: Path) -> None:
    """A limit of 400 MiB of addresses above what the imports took, thread stacks included."""
    out = tmp_path / "out.safetensors"
    command = ["merge", small(tmp_path), "--into", large, "-o", out, "--threads", 1]
    done = limited("AS", f"used + 400 * {MIB}", *command, "--memory", "32M")
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 768 * MIB
    out.unlink()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures as Linux does")
def test_too_little_memory_is_one_sentence_and_leaves_the_old_file(
    large: Path, tmp_path: Path
) -> None:
    """Here the LoRA itself changes a tensor that does not fit."""
    key = "first_stage_model.0"
    lora, out = tmp_path / "wide.safetensors", tmp_path / "out.safetensors"
    save_file({f"{key}.diff": torch.ones(64 * MIB, dtype=torch.float16)}, lora)
    out.write_bytes(b"old")
    command = ["merge", lora, lora, "-o", out, "--overwrite", "--threads", 1]
    done = limited("AS", f"used + 300 * {MIB}", *command)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "memory" in done.stderr.lower()
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.glob(".out*"))


def test_ten_thousand_modules(tmp_path: Path) -> None:
    """More than any LoRA has; what is done a module must not look at all the others."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number in range(10_000):
        layer = f"unet.blocks.{number}.attn.to_q"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(1, 2, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(3, 1, generator=generator)
        tensors[f"{layer}.alpha"] = torch.tensor(float(1 + number % 700))
    file, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(tensors, file)
    begun = time.monotonic()
    assert run("inspect", file).exit_code == 0
    ran("cut-blocks", file, "--drop", "B00", "-o", out, "--dtype", "fp32")
    written = load_lora(out, header_only=True)
    assert len(written.adapters) == 9_999 and "unet.blocks.0.attn.to_q" not in written.adapters
    assert time.monotonic() - begun < 120
