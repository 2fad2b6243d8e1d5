"""--size: the whole file fits, whatever else is in it, and hardly a byte is left unspent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from tests.helpers import ran, refused, tensors_of

SPENT = 0.97
"""What is left: room for the writer's own metadata, and the last direction that did not fit."""


def fits(size: int, *arguments: object, out: Path) -> lorakit.LoraFile:
    """Run a command with --size; the file must be of that size at the most, and nearly that."""
    ran(*arguments, "--size", size, "-o", out)
    written = out.stat().st_size
    assert SPENT * size < written <= size, f"{written} of {size}"
    return lorakit.load_lora(out)


def with_tensors(path: Path, out: Path, more: dict[str, Tensor], **told: str) -> Path:
    return synthetic.write_lora(out, tensors_of(path) | more, told)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dialect", "dtype"), [("kohya", "fp32"), ("diffusers", "fp16"), ("comfyui", "bf16")]
)
def test_names_of_every_dialect_and_numbers_of_every_width_are_counted(
    make_lora: Callable[..., Path], tmp_path: Path, dialect: str, dtype: str
) -> None:
    lora = make_lora("sdxl", dialect=dialect, rank=4, alpha=2, every=2)
    fits(200_000, "resize", lora, "--dtype", dtype, out=tmp_path / "a.safetensors")


def test_training_metadata_the_recipe_and_what_is_set_are_counted(
    sd15_lora: Path, tmp_path: Path
) -> None:
    """Also in scripts that take more bytes in a file than letters."""
    wordy = with_tensors(sd15_lora, tmp_path / "猫.safetensors", {}, ss_tags="猫耳" * 5_000)
    out = tmp_path / "a.safetensors"
    fits(150_000, "resize", wordy, "--metadata", f"note={'x' * 20_000}", out=out)
    many = [f"{sd15_lora}:{strength / 100}" for strength in range(1, 60)]
    fits(160_000, "merge", *many, out=tmp_path / "b.safetensors")
    said = refused("resize", wordy, "--size", 30_000, "-o", tmp_path / "c.safetensors", status=2)
    assert "leaves no room for layers: the metadata, norms and biases" in said
    given = ["resize", sd15_lora, "--size", 30_000, "--metadata", f"note={'x' * 40_000}"]
    assert "--metadata take" in refused(*given, "-o", tmp_path / "c.safetensors", status=2)


def test_norms_biases_and_textual_inversions_are_counted(sd15_lora: Path, tmp_path: Path) -> None:
    """They have no rank and are kept whole."""
    more = {
        "lora_unet_up_blocks_3_resnets_0_norm1.diff": random(20_000),
        "lora_unet_up_blocks_3_resnets_0_conv1.diff_b": random(10_000),
        "bundle_emb.word.string_to_param.*": random(4, 768),
    }
    rich = with_tensors(sd15_lora, tmp_path / "rich.safetensors", more)
    found = fits(260_000, "resize", rich, "--dtype", "fp16", out=tmp_path / "a.safetensors")
    assert sum(len(a.shape) == 1 for a in found.adapters.values()) == 2 and found.carried
    said = refused("resize", rich, "--size", 60_000, "-o", tmp_path / "b.safetensors", status=2)
    assert "norms and biases" in said


def test_what_convert_leaves_as_it_is_is_counted(sd15_lora: Path, tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_resnets_0_time_emb_proj.hada_"
    more = {
        f"{stem}w{i}_{s}": random(*((300, 8) if s == "a" else (8, 300))) for i in "12" for s in "ab"
    }
    mixed = with_tensors(sd15_lora, tmp_path / "mixed.safetensors", more)
    out = tmp_path / "a.safetensors"
    whole = ran("convert", mixed, "--as", "lora", "-o", out)["output_bytes"]
    report = ran(
        "convert", mixed, "--as", "lora", "--size", whole - 60_000, "-o", out, "--overwrite"
    )
    assert SPENT * (whole - 60_000) < report["output_bytes"] <= whole - 60_000
    assert len(lorakit.load_lora(out).adapters) > 200, "the LoRAs are all there"
    given = ["convert", mixed, "--as", "lora", "--size", 100_000]
    assert "leaves no room" in refused(*given, "-o", tmp_path / "b.safetensors", status=2)


@pytest.mark.parametrize(
    "more", [[], ["--as", "dora"], ["--to", "diffusers"], ["--to", "diffusers", "--as", "dora"],
             ["--dtype", "fp32"]],
)  # fmt: skip
def test_an_extraction_fits_magnitudes_included(
    sd15: Path, sd15_tuned: Path, tmp_path: Path, more: list[str]
) -> None:
    found = fits(300_000, "extract", sd15, sd15_tuned, *more, out=tmp_path / "a.safetensors")
    kinds = {adapter.kind for adapter in found.adapters.values()}
    assert ("dora" in kinds) == ("dora" in more)


def test_what_is_written_in_another_dtype_is_counted_in_that(
    slim_lora: Path, make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_lora("sd1", rank=4, alpha=2, seed=3, every=3)
    for command in ("merge", "extract"):
        out = tmp_path / f"{command}.safetensors"
        fits(85_000, command, slim_lora, other, "--dtype", "fp32", out=out)


def test_a_whole_difference_takes_no_rank_rule(
    sd15: Path, sd15_tuned: Path, tmp_path: Path
) -> None:
    """They were passed over: the file had all of ΔW, whatever the size or the rank."""
    for rule in (["--size", "300K"], ["--rank", 4], ["--energy", 0.9]):
        given = ["extract", sd15, sd15_tuned, "--as", "full", *rule]
        said = refused(*given, "-o", tmp_path / "a.safetensors", status=2)
        assert "keeps ΔW itself, which has no rank" in said


def test_a_larger_size_never_keeps_less(slim_lora: Path, tmp_path: Path) -> None:
    kept = []
    for size in (27_000, 40_000, 54_000, 1_000_000):
        out = tmp_path / f"{size}.safetensors"
        kept.append(ran("resize", slim_lora, "--size", size, "-o", out)["totals"]["energy"])
    assert kept == sorted(kept) and kept[0] < 0.9 and kept[-1] == pytest.approx(1.0)
