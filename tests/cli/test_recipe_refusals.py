"""Recipes that cannot be repeated, and those where the bytes may differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lorakit.cli._inputs import model_record
from tests.cli.inputs import TWO, recipe_of
from tests.helpers import metadata_of, ran, refused, run, tensors_of


def made(folder: Path, *arguments: object) -> Path:
    out = folder / "made.safetensors"
    ran("merge", *(arguments or TWO), "-o", out)
    return out


def test_a_missing_input_is_named_with_its_hash_and_the_folders(folder: Path) -> None:
    file = made(folder)
    digest = metadata_of(Path("a.safetensors"))["sshs_model_hash"][:10]
    Path("a.safetensors").unlink()
    words = refused("merge", "--recipe", file, "--lora-dir", "pipeline", "-o", "x.safetensors")
    assert f"a.safetensors (LoRA, {digest})" in words and "--lora-dir" in words
    assert str(folder) in words and "pipeline" in words
    assert "b.safetensors" not in words
    assert not Path("x.safetensors").exists()


def test_an_input_with_other_content_is_refused_with_both_hashes(folder: Path) -> None:
    file = made(folder)
    digests = [metadata_of(Path(f"{n}.safetensors"))["sshs_model_hash"][:10] for n in "ab"]
    Path("b.safetensors").replace("a.safetensors")
    shutil.copy("a.safetensors", "b.safetensors")
    words = refused("merge", "--recipe", file, "-o", "x.safetensors")
    assert all(digest in words for digest in digests) and "a.safetensors" in words
    assert len(words.splitlines()) == 1


def test_a_model_of_the_same_header_is_told_by_its_bytes(folder: Path) -> None:
    file = made(folder, "a.safetensors", "--into", "base.safetensors")
    before = model_record("base.safetensors")
    Path("tuned.safetensors").replace("base.safetensors")
    after = model_record("base.safetensors")
    assert (before["header"], before["bytes"]) == (after["header"], after["bytes"])
    words = refused("merge", "--recipe", file, "-o", "x.safetensors")
    assert before["sample"][:10] in words and after["sample"][:10] in words


def rewritten(file: Path, **metadata: str) -> None:
    save_file(tensors_of(file), file, {**metadata_of(file), **metadata})


def changed(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    recipe = recipe_of(file)
    change(recipe)
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    rewritten(file, **{"lorakit.recipe": text})


def test_other_metadata_of_an_input_is_a_doubt(folder: Path) -> None:
    """It goes into the output, where the file is the first of the stack."""
    file = made(folder)
    attic = folder.parent / "attic"
    attic.mkdir()
    shutil.copy("a.safetensors", attic)
    rewritten(Path("a.safetensors"), ss_training_comment="edited")
    report = ran("merge", "--recipe", file, "-o", "x.safetensors")
    doubt, compared = report["notes"]
    assert "a.safetensors has the recorded tensors, but other names" in doubt
    assert "differs from made.safetensors" in compared and "metadata" in compared
    assert metadata_of(Path("x.safetensors"))["ss_training_comment"] == "edited"
    assert recipe_of(Path("x.safetensors")) != recipe_of(file)
    report = ran("merge", "--recipe", file, "--lora-dir", attic, "-o", "y.safetensors")
    assert report["notes"] == ["y.safetensors has the same bytes as made.safetensors."]


def test_another_alpha_in_a_peft_folder_is_a_doubt(folder: Path) -> None:
    file = made(folder, "peft-a", "peft-b")
    config = Path("peft-b/adapter_config.json")
    config.write_text(
        config.read_text(encoding="utf-8").replace('"lora_alpha": 3', '"lora_alpha": 6'),
        encoding="utf-8",
    )
    notes = ran("merge", "--recipe", file, "-o", "x.safetensors")["notes"]
    assert "peft-b has the recorded tensors, but other" in notes[0]
    assert "differs from made.safetensors" in notes[1]


def test_another_version_is_a_doubt_and_not_a_refusal(folder: Path) -> None:
    file = made(folder)
    changed(file, lambda recipe: recipe.update(lorakit="0.0.9"))
    result = run("merge", "--recipe", file, "-o", "x.safetensors")
    assert result.exit_code == 0
    assert "note: made.safetensors was made by lorakit 0.0.9" in result.stderr
    assert recipe_of(Path("x.safetensors"))["lorakit"] != "0.0.9"


BROKEN: dict[str, Callable[[dict[str, object]], object]] = {
    "unknown option": lambda recipe: recipe["options"].update(sorcery=1),  # type: ignore[attr-defined]
    "unknown command": lambda recipe: recipe.update(command="conjure"),
    "unknown method": lambda recipe: recipe["options"].update(method="magic"),  # type: ignore[attr-defined]
    "wrong type": lambda recipe: recipe["options"].update(rank="4"),  # type: ignore[attr-defined]
    "true is no number": lambda recipe: recipe["options"].update(rank=True),  # type: ignore[attr-defined]
    "wrong value": lambda recipe: recipe["options"].update(energy=7),  # type: ignore[attr-defined]
    "wrong dtype": lambda recipe: recipe["options"].update(dtype="F17"),  # type: ignore[attr-defined]
    "wrong metadata": lambda recipe: recipe["options"].update(metadata={"x": 1}),  # type: ignore[attr-defined]
    "wrong strength": lambda recipe: recipe["inputs"][0].update(strength="much"),  # type: ignore[index]
    "way out": lambda recipe: recipe["inputs"][0].update(lora="../a.safetensors"),  # type: ignore[index]
    "no inputs": lambda recipe: recipe.pop("inputs"),
    "no hash": lambda recipe: recipe["inputs"][0].pop("sha256"),  # type: ignore[index]
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_recipe_that_cannot_be_followed_is_refused(folder: Path, name: str) -> None:
    file = made(folder)
    changed(file, BROKEN[name])
    words = refused("merge", "--recipe", file, "-o", "x.safetensors")
    assert "made.safetensors" in words and "recipe" in words and len(words.splitlines()) == 1
    assert not Path("x.safetensors").exists()


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", "[" * 100_000])
def test_a_recipe_that_is_none_is_refused(folder: Path, text: str) -> None:
    file = made(folder)
    rewritten(file, **{"lorakit.recipe": text})
    assert "recipe" in refused("merge", "--recipe", file, "-o", "x.safetensors")


def test_a_file_without_a_recipe_is_refused(folder: Path) -> None:
    for file in ("a.safetensors", made(folder, *TWO, "--no-metadata")):
        words = refused("merge", "--recipe", file, "-o", "x.safetensors")
        assert str(file) in words and "found none in its metadata" in words


FIXED: dict[str, list[object]] = {
    "LORA...": ["a.safetensors"],
    "--prompt": ["--prompt", "<lora:a:1>"],
    "--rank": ["--rank", 3],
    "--density": ["--density", 0.5],
    "--method": ["--method", "linear"],
    "--lambda": ["--lambda", 0],
    "--seed": ["--seed", 0],
    "--dtype": ["--dtype", "fp32"],
    "--metadata": ["--metadata", "a=b"],
    "--no-metadata": ["--no-metadata"],
    "--allow-unmatched": ["--allow-unmatched"],
    "--presets-file": ["--presets-file", "own.txt"],
}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_recipe_fixes_is_not_given_again(folder: Path, name: str) -> None:
    file = made(folder)
    words = refused("merge", "--recipe", file, *FIXED[name], "-o", "x.safetensors", status=2)
    assert f"--recipe repeats all that made the file; leave {name} out." in words


@pytest.mark.parametrize("option", ["--into", "--against"])
def test_a_model_that_was_not_there_is_not_given(folder: Path, option: str) -> None:
    arguments = ["--recipe", made(folder), option, "base.safetensors", "-o", "x.safetensors"]
    assert f"without {option}" in refused("merge", *arguments, status=2)


def test_the_output_is_another_file_of_the_same_form(folder: Path) -> None:
    file = made(folder)
    bytes_before = file.read_bytes()
    ran("convert", "a.safetensors", "--to", "peft", "-o", "made-peft")
    again = [("merge", "--recipe", file), ("merge", "--recipe", "made-peft")]
    assert "repeated" in refused(*again[0], "-o", file, "--overwrite")
    assert "repeated" in refused(*again[1], "-o", "made-peft/x", "--overwrite")
    assert ".safetensors name" in refused(*again[0], "-o", "again")
    assert "folder's name" in refused(*again[1], "-o", "again.safetensors")
    assert "existing" in refused(*again[0], "-o", "foreign.safetensors")
    assert "is the input" in refused(*again[0], "-o", "a.safetensors", "--overwrite")
    assert bool(file.read_bytes() == bytes_before)
