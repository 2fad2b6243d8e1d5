"""merge against Σ strength · ΔW in float64; every bug of kohya's merge is a test here."""

from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.linalg.ranks import RankRule
from lorakit.methods.method import Method
from tests import reference
from tests.helpers import (
    FP16,
    FP32,
    dense,
    ran,
    run,
    tensors_of,
    total_error,
    weighted,
    worst_error,
)


@pytest.fixture(scope="module")
def pair(make_lora) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """Ranks 8 and 4, alphas 4 and 1, different dialects, one with convolutions and without TE."""
    style = make_lora("sd1", rank=8, alpha=4, seed=1, conv=True, te=False)
    other = make_lora("sd1", rank=4, alpha=1, seed=2, dialect="diffusers")
    return style, other


@pytest.mark.parametrize("strengths", [(0.7, -0.4), (1.0, 1.0), (-2.0, 0.5), (0.5, 0.0)])
def test_a_stack_is_the_signed_sum(pair: tuple[Path, Path], strengths: tuple[float, float]) -> None:
    first, second = (lorakit.load_lora(path) for path in pair)
    merged, _ = lorakit.merge([(first, strengths[0]), (second, strengths[1])])
    exact = weighted([(dense(first), strengths[0]), (dense(second), strengths[1])])
    exact = {module: delta for module, delta in exact.items() if delta.any()}
    assert worst_error(dense(merged), exact) < FP32


def test_the_sum_survives_the_way_to_disk_in_fp16(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    ran("merge", f"{pair[0]}:0.7", f"{pair[1]}:-0.4", "-o", out, "--verify")
    exact = weighted([(dense(pair[0]), 0.7), (dense(pair[1]), -0.4)])

    def check(answer: Tensor) -> None:
        found = {module: delta * answer for module, delta in dense(out).items()}
        assert worst_error(found, exact) < FP16

    reference.negative_control(check, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_loras_in_fp8_are_merged_like_others(
    pair: tuple[Path, Path], tmp_path: Path, dtype: str, method: str
) -> None:
    small, wide = tmp_path / "small.safetensors", tmp_path / "wide.safetensors"
    ran("merge", pair[0], "-o", small, "--dtype", dtype)
    ran("convert", small, "-o", wide, "--dtype", "fp32")
    found, _ = lorakit.merge(_stack(small, pair[1]), method=Method(name=method))
    expected, _ = lorakit.merge(_stack(wide, pair[1]), method=Method(name=method))
    assert worst_error(dense(found), dense(expected)) < FP32


def _stack(*paths: Path) -> list[tuple[lorakit.LoraFile, float]]:
    return [(lorakit.load_lora(path), 1.0) for path in paths]


@pytest.mark.parametrize("strength", [0.5, 1.0, -1.0])
def test_a_single_lora_is_itself_times_its_strength(
    sd15_lora: Path, tmp_path: Path, strength: float
) -> None:
    """kohya's plain merge squares the strength: 0.5 gives 0.25; its lbw loses the sign."""
    out = tmp_path / "one.safetensors"
    ran("merge", f"{sd15_lora}:{strength}", "-o", out)
    exact = {module: strength * delta for module, delta in dense(sd15_lora).items()}
    assert worst_error(dense(out), exact) < FP16
    assert tensors_of(out).keys() == tensors_of(sd15_lora).keys()


def test_two_loras_at_full_strength_are_not_halved(pair: tuple[Path, Path]) -> None:
    """kohya's --concat keeps alpha while the rank doubles: half the strength."""
    first, second = (lorakit.load_lora(path) for path in pair)
    merged, _ = lorakit.merge([(first, 1.0), (second, 1.0)])
    whole = total_error(dense(merged), weighted([(dense(first), 1.0), (dense(second), 1.0)]))
    assert whole < FP32
    assert all(a.alpha == a.rank for a in merged.adapters.values())  # type: ignore[attr-defined]


def test_the_exact_rank_is_the_sum_of_the_ranks_cut_to_the_numerical_rank(
    pair: tuple[Path, Path],
) -> None:
    first, second = (lorakit.load_lora(path) for path in pair)
    merged, _ = lorakit.merge([(first, 1.0), (second, 1.0)])
    found = dense(merged)
    for module, adapter in merged.adapters.items():
        parts = [file.adapters[module] for file in (first, second) if module in file.adapters]
        assert adapter.rank == min(sum(part.rank for part in parts), *found[module].shape)
    twice, _ = lorakit.merge([(first, 0.5), (first, 0.5)])
    once = dense(first)
    assert {m: a.rank for m, a in twice.adapters.items()} == {
        m: min(a.rank, *once[m].shape) for m, a in first.adapters.items()
    }


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_rank_keeps_the_best_approximation_of_the_sum(pair: tuple[Path, Path], rank: int) -> None:
    first, second = (lorakit.load_lora(path) for path in pair)
    merged, report = lorakit.merge([(first, 0.7), (second, -0.4)], rule=RankRule(rank=rank))
    exact = weighted([(dense(first), 0.7), (dense(second), -0.4)])
    best = {module: reference.best_rank(delta, rank) for module, delta in exact.items()}
    kept = dense(merged)
    for row in report.rows:
        found, whole = kept[row.module], exact[row.module]
        least = reference.relative_error(best[row.module], whole)
        assert reference.relative_error(found, whole) <= least * (1 + 1e-4) + FP32
        assert row.error == pytest.approx(least, abs=1e-5)
        assert row.energy == pytest.approx(1 - least**2, abs=1e-5)
        assert row.norm == pytest.approx(float(whole.norm()), rel=1e-5)


def test_te_unet_and_blocks_have_their_own_strengths(sd15_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "apart.safetensors"
    ran("merge", f"{sd15_lora}:te=0.5:unet=-2:lbw=OUTALL", "-o", out)
    exact = {}
    for module, delta in dense(sd15_lora).items():
        if module.startswith("text_encoder"):
            exact[module] = 0.5 * delta
        elif module.startswith("unet.up_blocks"):
            exact[module] = -2 * delta
    assert worst_error(dense(out), exact) < FP16


def test_a_pasted_tag_and_a_prompt_mean_what_the_arguments_mean(
    sd15_lora: Path, tmp_path: Path
) -> None:
    folder, stem = sd15_lora.parent, sd15_lora.stem
    outs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    ran("merge", f"{sd15_lora}:0.8:lbw=INALL", "-o", outs[0], "--no-metadata")
    tag = f"<lora:{stem}:0.8:lbw=INALL>"
    ran("merge", tag, "--lora-dir", folder, "-o", outs[1], "--no-metadata")
    ran(
        "merge", "--prompt", f"masterpiece, {tag}, 1girl", "--lora-dir", folder,
        "-o", outs[2], "--no-metadata",
    )  # fmt: skip
    assert bool(outs[0].read_bytes() == outs[1].read_bytes() == outs[2].read_bytes())


def test_what_cancels_is_refused_and_not_written_as_noise(sd15_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "nothing.safetensors"
    result = run("merge", f"{sd15_lora}:1", f"{sd15_lora}:-1", "-o", out)
    assert result.exit_code == 1
    assert "Nothing is left" in result.output or "Nothing is left" in str(result.exception)
    assert not out.exists()


def test_tucker_and_plain_convolutions_add_up() -> None:
    """kohya broadcasts a Tucker LoCon's 1x1 product over all taps."""
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    torch.manual_seed(0)
    tucker = {
        f"{name}.lora_up.weight": torch.randn(10, 4, 1, 1),
        f"{name}.lora_down.weight": torch.randn(4, 10, 1, 1),
        f"{name}.lora_mid.weight": torch.randn(4, 4, 3, 3),
        f"{name}.alpha": torch.tensor(2.0),
    }
    plain = {
        f"{name}.lora_up.weight": torch.randn(10, 3, 1, 1),
        f"{name}.lora_down.weight": torch.randn(3, 10, 3, 3),
    }
    loras = [lorakit.load_lora(tensors) for tensors in (tucker, plain)]
    merged, _ = lorakit.merge([(loras[0], 1.0), (loras[1], -0.5)])
    exact = weighted([(dense(loras[0]), 1.0), (dense(loras[1]), -0.5)])
    assert worst_error(dense(merged), exact) < FP32


def test_missing_layers_count_as_zero(make_lora) -> None:  # type: ignore[no-untyped-def]
    whole = lorakit.load_lora(make_lora("sd1", rank=4, seed=1))
    unet = lorakit.load_lora(make_lora("sd1", rank=4, seed=2, te=False))
    merged, _ = lorakit.merge([(whole, 1.0), (unet, 1.0)])
    assert merged.adapters.keys() == whole.adapters.keys()
    assert synthetic.BASE_VERSION["sd1"] == "sd_v1"
