"""lorakit convert from the command line: what it writes, says and refuses."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.lorafile import load_lora
from lorakit.names.flux import FLUX
from tests import layouts
from tests.helpers import dense, metadata_of, ran, refused, run, worst_error
from tests.oracle.test_architectures import ends, lora_file

KINDS = {"dora", "oft", "ia3", "full", "vector"}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Write a kohya LoRA for Flux: the first and last block of each kind."""
    file: dict[str, Tensor] = lora_file(FLUX, "kohya", layouts.tiny_model(ends(FLUX)))
    path = tmp_path / "kohya.safetensors"
    save_file(file, path, metadata={"ss_tag_frequency": "{}"})
    return path


def test_the_report_is_one_stable_object(lora: Path) -> None:
    result = run("convert", lora, "--to", "diffusers", "-o", lora.with_name("d"), "--json", "-q")
    report = json.loads(result.stdout)
    assert (report["schema"], report["command"]) == (1, "convert")
    assert report["totals"]["layers"] == len(report["rows"]) > 0
    assert {row["note"] for row in report["rows"]} == {"lora"}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfyui", "peft"])
def test_the_same_command_twice_gives_the_same_bytes_and_the_same_change(
    lora: Path, dialect: str
) -> None:
    name = "out" if dialect == "peft" else "out.safetensors"
    outs = [lora.parent / folder / name for folder in ("first", "second")]
    for out in outs:
        report = ran("convert", lora, "--to", dialect, "-o", out, "--verify")
        assert report["verified"]["largest"] < 1e-6
    files = [
        out / "transformer" / "adapter_model.safetensors" if out.is_dir() else out for out in outs
    ]
    first, second = (file.read_bytes() for file in files)
    assert bool(first == second)
    back = lora.with_name("back.safetensors")
    ran("convert", outs[0], "--to", "kohya", "-o", back)
    assert worst_error(dense(load_lora(back)), dense(load_lora(lora))) < 1e-6


def test_the_recipe_and_the_training_metadata_are_there(lora: Path) -> None:
    out = lora.with_name("out.safetensors")
    ran("convert", lora, "--to", "comfyui", "-o", out)
    metadata = metadata_of(out)
    assert metadata["ss_tag_frequency"] == "{}"
    recipe = json.loads(metadata["lorakit.recipe"])
    assert (recipe["command"], recipe["options"]) == ("convert", {"to": "comfyui"})


def test_a_dry_run_writes_nothing(lora: Path) -> None:
    out = lora.with_name("out.safetensors")
    report = ran("convert", lora, "--to", "diffusers", "-o", out, "--dry-run")
    assert report["plan"]["layers"] == len(report["rows"])
    assert report["plan"]["output_bytes"] >= sum(t.nbytes for t in load_file(lora).values())
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "what to change"),
        (["--to", "diffusers", "--rank", "4"], "--as lora"),
        (["--as", "lora", "--dry-run"], "headers only"),
        (["--to", "kohya", "--against", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_what_makes_no_sense_is_refused(lora: Path, arguments: list[str], words: str) -> None:
    out = lora.with_name("out.safetensors")
    status = 1 if "nowhere" in words else 2
    assert words in refused("convert", lora, *arguments, "-o", out, status=status)
    assert not out.exists()


def test_a_strength_is_merges_business(lora: Path) -> None:
    words = refused(
        "convert", f"{lora}:0.5", "--to", "diffusers", "-o", lora.with_name("x"), status=2
    )
    assert "without a strength" in words


def test_a_kind_that_a_dialect_has_no_names_for_is_named(tmp_path: Path) -> None:
    from tests.oracle.test_mixed_kinds import mixed

    path = tmp_path / "mixed.safetensors"
    save_file(mixed(), path)
    words = refused("convert", path, "--to", "diffusers", "-o", tmp_path / "out.safetensors")
    assert "--as lora" in words and "found" in words
    report = ran("convert", path, "--to", "comfyui", "-o", tmp_path / "out.safetensors")
    # q, k and v were a LoRA, a LoHa and a LoKr: as one layer they are a LoRA or the whole ΔW.
    notes = {row["note"] for row in report["rows"]}
    assert {"dora", "oft", "ia3", "full", "vector"} <= notes <= {*KINDS, "lora"}
