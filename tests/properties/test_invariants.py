"""What must not matter: order, gauge, dialect, threads, memory, hash seed, sign."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorakit
from tests import reference
from tests.helpers import FP16, FP32, dense, ran, tensors_of, weighted, worst_error

MakeLora = Callable[..., Path]
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"


@pytest.fixture(scope="module")
def loras(make_lora: MakeLora) -> list[Path]:
    told = [{"rank": 4, "alpha": 1}, {"rank": 6, "alpha": 6}, {"rank": 3, "dialect": "diffusers"}]
    slim = {"te": False, "every": 3}
    return [make_lora("sd1", seed=seed, **slim, **more) for seed, more in enumerate(told)]


def bytes_of(tmp_path: Path, name: str, *arguments: object) -> bytes:
    out = tmp_path / f"{name}.safetensors"
    ran(*arguments, "-o", out, "--no-metadata")
    return out.read_bytes()


def test_order_threads_and_memory_change_no_byte(loras: list[Path], tmp_path: Path) -> None:
    terms = [f"{path}:{at}" for path, at in zip(loras, (0.7, -0.4, 1.5), strict=True)]
    expected = bytes_of(tmp_path, "first", "merge", *terms)
    assert bool(bytes_of(tmp_path, "one-thread", "merge", *terms, "--threads", 1) == expected)
    small = ("--threads", 3, "--memory", "1M")
    assert bool(bytes_of(tmp_path, "small", "merge", *terms, *small) == expected)
    bytes_of(tmp_path, "reversed", "merge", *reversed(terms))
    files = [tmp_path / f"{name}.safetensors" for name in ("reversed", "first")]
    # The names written are those of the first LoRA; what they name is the same to the bit.
    assert worst_error(*(dense(file) for file in files)) == 0
    assert bytes_of(tmp_path, "other", "merge", *terms[:2]) != expected


def test_a_checkpoint_does_not_depend_on_the_order(
    sd15: Path, loras: list[Path], tmp_path: Path
) -> None:
    terms = [f"{path}:{at}" for path, at in zip(loras, (0.7, -0.4, 1.5), strict=True)]
    one = bytes_of(tmp_path, "one", "merge", *terms, "--into", sd15)
    other = bytes_of(tmp_path, "two", "merge", *reversed(terms), "--into", sd15, "--threads", 1)
    assert bool(one == other)


def test_extraction_does_not_depend_on_threads(
    sd15: Path, sd15_tuned: Path, tmp_path: Path
) -> None:
    command = ("extract", sd15, sd15_tuned, "--rank", 3, "--only", "IN0|MID")
    one = bytes_of(tmp_path, "one", *command, "--threads", 1)
    assert bool(one == bytes_of(tmp_path, "two", *command, "--threads", 3))


def test_the_hash_seed_changes_no_byte(loras: list[Path], tmp_path: Path) -> None:
    made = []
    for seed in ("1", "2"):
        out = tmp_path / seed / "merged.safetensors"
        command = [sys.executable, "-m", "lorakit", "merge", *loras, "-o", out, "-q"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        made.append(out.read_bytes())
    assert bool(made[0] == made[1])


@pytest.mark.parametrize("dialect", synthetic.DIALECTS)
def test_the_dialect_of_an_input_changes_nothing(
    make_lora: MakeLora, tmp_path: Path, dialect: str
) -> None:
    kohya = make_lora("sdxl", rank=4, alpha=2, te=False, seed=7)
    other = make_lora("sdxl", rank=4, alpha=2, te=False, seed=7, dialect=dialect)
    merged, _ = lorakit.merge([(lorakit.load_lora(other), 0.5), (lorakit.load_lora(kohya), 0.5)])
    found, expected = dense(merged), dense(kohya)
    assert found.keys() == expected.keys(), "one entry a module"
    assert worst_error(found, expected) < FP16


def test_the_gauge_changes_nothing(loras: list[Path]) -> None:
    """(10 · up, down / 10) is the same ΔW; PEFT's linear moves by a factor of 4."""
    tensors = {key: tensor.float() for key, tensor in tensors_of(loras[0]).items()}
    factors = {".lora_up.weight": 1e3, ".lora_down.weight": 1e-3}
    turned = {
        key: tensor * next((f for end, f in factors.items() if key.endswith(end)), 1.0)
        for key, tensor in tensors.items()
    }
    second = lorakit.load_lora(loras[1])
    made = [
        lorakit.merge(
            [(lorakit.load_lora(part), 0.7), (second, 1.0)], rule=lorakit.RankRule(rank=5)
        )
        for part in (tensors, turned)
    ]
    assert worst_error(dense(made[1][0]), dense(made[0][0])) < 1e-5


def test_negating_all_strengths_negates(loras: list[Path]) -> None:
    files = [lorakit.load_lora(path) for path in loras]
    plus, _ = lorakit.merge([(file, 0.5 + i) for i, file in enumerate(files)])
    minus, _ = lorakit.merge([(file, -0.5 - i) for i, file in enumerate(files)])
    expected = {module: -delta for module, delta in dense(plus).items()}
    assert worst_error(dense(minus), expected) < FP32


@pytest.mark.parametrize("times", [1, 3])
def test_the_same_lora_at_one_nth_n_times_is_itself(loras: list[Path], times: int) -> None:
    file = lorakit.load_lora(loras[0])
    merged, _ = lorakit.merge([(file, 1 / times)] * times)
    assert worst_error(dense(merged), dense(file)) < FP32
    ranks = {module: adapter.rank for module, adapter in merged.adapters.items()}
    assert ranks == {module: adapter.rank for module, adapter in file.adapters.items()}


@st.composite
def tiny(draw: st.DrawFn) -> dict[str, Tensor]:
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in draw(st.sets(st.sampled_from("qkv"), min_size=1)):
        rank = draw(st.integers(1, 9))
        size = 10.0 ** draw(st.integers(-4, 3))
        tensors[f"{NAME}{layer}.lora_up.weight"] = torch.randn(6, rank, generator=generator) * size
        tensors[f"{NAME}{layer}.lora_down.weight"] = torch.randn(rank, 8, generator=generator)
        if draw(st.booleans()):
            tensors[f"{NAME}{layer}.alpha"] = torch.tensor(draw(st.integers(1, 16)))
    return tensors


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(tiny(), st.floats(-4, 4).filter(lambda s: abs(s) > 0.01)), min_size=1, max_size=4
    )
)
def test_any_stack_is_the_signed_sum(stack: list[tuple[dict[str, Tensor], float]]) -> None:
    files = [(lorakit.load_lora(tensors), strength) for tensors, strength in stack]
    merged, report = lorakit.merge(files)
    exact = weighted([(dense(file), strength) for file, strength in files])
    largest = {
        module: max(
            abs(s) * float(dense(f)[module].norm()) for f, s in files if module in f.adapters
        )
        for module in exact
    }
    found = dense(merged)
    for module, delta in exact.items():
        off = found.get(module, torch.zeros_like(delta)) - delta
        assert float(off.norm()) <= 2 * FP32 * largest[module]
    assert len(report.rows) == len(exact)


@settings(max_examples=40)
@given(tiny(), st.integers(1, 9))
def test_any_resize_is_the_best_of_its_rank(tensors: dict[str, Tensor], rank: int) -> None:
    file = lorakit.load_lora(tensors)
    resized, _ = lorakit.resize(file, rule=lorakit.RankRule(rank=rank))
    exact, found = dense(file), dense(resized)
    for module, delta in exact.items():
        least = reference.relative_error(reference.best_rank(delta, rank), delta)
        assert reference.relative_error(found[module], delta) <= least + 2 * FP32
