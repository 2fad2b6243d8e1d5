"""resize against the best approximation in float64; kohya's off-by-ones are tests here."""

import json
from pathlib import Path

import pytest
import synthetic

import lorakit
from lorakit.linalg.ranks import RankRule
from tests import reference
from tests.helpers import FP16, FP32, dense, ran, refused, run, tensors_of, worst_error


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_new_rank_is_the_best_of_that_rank(slim_sdxl_lora: Path, rank: int) -> None:
    lora = lorakit.load_lora(slim_sdxl_lora)
    resized, report = lorakit.resize(lora, rule=RankRule(rank=rank))
    exact = dense(lora)
    best = {module: reference.best_rank(delta, rank) for module, delta in exact.items()}
    assert worst_error(dense(resized), best) < 1e-4
    assert all(
        adapter.rank == min(rank, lora.adapters[m].rank) for m, adapter in resized.adapters.items()
    )
    for row in report.rows:
        error = reference.relative_error(best[row.module], exact[row.module])
        assert row.error == pytest.approx(error, abs=1e-5)


def test_a_larger_rank_changes_nothing(slim_sdxl_lora: Path) -> None:
    lora = lorakit.load_lora(slim_sdxl_lora)
    resized, _ = lorakit.resize(lora, rule=RankRule(rank=64))
    assert worst_error(dense(resized), dense(lora)) < FP32
    assert max(adapter.rank for adapter in resized.adapters.values()) == 4


def test_one_by_one_convolutions_take_the_rank_of_linear_layers(make_lora) -> None:  # type: ignore[no-untyped-def]
    """kohya gives every 4-D tensor the conv rank."""
    lora = lorakit.load_lora(make_lora("sd1", rank=4, conv=True))
    resized, _ = lorakit.resize(lora, rule=RankRule(rank=3, conv_rank=1))
    for module, adapter in resized.adapters.items():
        wide = len(adapter.shape) == 4 and adapter.shape[2] > 1
        assert adapter.rank == (1 if wide else 3), module
    assert any(len(a.shape) == 4 and a.shape[2] == 1 for a in resized.adapters.values())


def test_error_and_energy_keep_the_fewest_directions_that_suffice(slim_sdxl_lora: Path) -> None:
    lora = lorakit.load_lora(slim_sdxl_lora)
    exact = dense(lora)
    for rule, bound in ((RankRule(error=0.3), 0.3), (RankRule(energy=0.9), 0.1**0.5)):
        resized, report = lorakit.resize(lora, rule=rule)
        for row in report.rows:
            assert row.rank_after is not None and row.error is not None
            assert row.error <= bound + 1e-6
            fewer = reference.best_rank(exact[row.module], row.rank_after - 1)
            assert reference.relative_error(fewer, exact[row.module]) > bound - 1e-6
        assert len(resized.adapters) == len(lora.adapters)


@pytest.mark.parametrize("size", [150_000, 300_000])
def test_size_bounds_the_whole_file_and_spends_it_well(
    sdxl_lora: Path, tmp_path: Path, size: int
) -> None:
    out = tmp_path / "small.safetensors"
    report = ran("resize", sdxl_lora, "--size", size, "-o", out)
    assert out.stat().st_size <= size
    ranks = {row["rank_after"] for row in report["rows"]}
    assert len(ranks) > 1, "the budget goes where the energy is"


def test_size_counts_the_training_metadata_too(sd15_lora: Path, tmp_path: Path) -> None:
    """Tag frequencies take hundreds of kilobytes in real files."""
    tensors = tensors_of(sd15_lora)
    wordy = synthetic.write_lora(tmp_path / "wordy.safetensors", tensors, {"ss_tags": "x" * 50_000})
    out = tmp_path / "small.safetensors"
    ran("resize", wordy, "--size", 120_000, "-o", out)
    assert 80_000 < out.stat().st_size <= 120_000
    assert "metadata" in refused("resize", wordy, "--size", 40_000, "-o", out, status=2)


def test_the_file_holds_the_resized_lora(slim_sdxl_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "r2.safetensors"
    ran("resize", slim_sdxl_lora, "--rank", 2, "-o", out, "--verify")
    best = {
        module: reference.best_rank(delta, 2) for module, delta in dense(slim_sdxl_lora).items()
    }
    assert worst_error(dense(out), best) < FP16


def test_several_files_go_into_a_folder(sd15_lora: Path, sdxl_lora: Path, tmp_path: Path) -> None:
    result = run("resize", sd15_lora, sdxl_lora, "--rank", 1, "-o", tmp_path / "all", "--json")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(
        p.name for p in (sd15_lora, sdxl_lora)
    )
    assert len(json.loads(result.stdout)) == 2, "one JSON value, whatever the number of files"
