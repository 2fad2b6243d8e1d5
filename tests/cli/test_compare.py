"""lorakit compare, and merge --analyze."""

import json
from pathlib import Path

import pytest
import synthetic

from tests.helpers import few, ran, refused, run, slim


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    layout = synthetic.single_file("sd1", factor=32)
    synthetic.write_checkpoint(tmp_path / "base.safetensors", layout)
    synthetic.write_tuned(tmp_path / "tuned.safetensors", layout)
    slim(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    for seed, name in enumerate(("style", "character", "third")):
        tensors = synthetic.lora_tensors("sd1", rank=4 + seed, seed=seed, factor=32)
        synthetic.write_lora(tmp_path / f"{name}.safetensors", few(tensors, every=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_loras(folder: Path) -> None:
    result = run("compare", "style.safetensors:0.8", "character.safetensors", "--rank", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("They have little to do with each other (largest cosine 0.0")
    titles = next(line for line in lines if line.startswith("block")).split("  ")
    assert [t.strip() for t in titles if t][:2] == ["block", "layers"]
    assert lines[-3].split()[0] == "all"


def test_three_loras_and_a_quiet_answer(folder: Path) -> None:
    names = [f"{name}.safetensors" for name in ("style", "character", "third")]
    result = run("compare", *names)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["cosine"] * 3 + ["overlap"] * 3 + ["most"] in lines
    assert ["block", "layers", *["1·2", "1·3", "2·3"] * 2, "conflict"] in lines
    quiet = run("compare", *names, "-q")
    assert quiet.stdout.count("\n") == 1
    many = run("compare", *names, "style.safetensors:0.5")
    assert "least cosine" in many.stdout and "nearly the same" in many.stdout


def test_json_is_one_stable_object(folder: Path) -> None:
    body = ran("compare", "style.safetensors", "character.safetensors")
    assert set(body) == {
        "schema", "command", "kind", "names", "total", "blocks", "rows", "only_in", "advice",
        "notes", "base", "mixture", "cut",
    }  # fmt: skip
    assert (body["schema"], body["command"], body["kind"]) == (1, "compare", "loras")
    assert set(body["total"]) == {
        "block", "layers", "norms", "cosines", "distances", "overlap", "chance", "conflict",
        "weighted_conflict", "energy",
    }  # fmt: skip
    assert set(body["rows"][0]) == {*body["total"], "module"}
    assert len(body["rows"]) == body["total"]["layers"]


def test_models(folder: Path) -> None:
    body = ran("compare", "base.safetensors", "tuned.safetensors")
    assert body["kind"] == "models" and 0 < body["total"]["distances"][0][1] < 1
    three = ran(
        "compare",
        "base.safetensors",
        "tuned.safetensors",
        "base.safetensors+style.safetensors:0.5",
    )
    assert three["kind"] == "changes" and "the first model" in three["notes"][0]
    assert (
        "extract takes the difference"
        in run("compare", "base.safetensors", "tuned.safetensors").stdout
    )


def test_analyze_comes_before_the_merge(folder: Path) -> None:
    stack = ("style.safetensors:0.8", "character.safetensors:-0.4")
    result = run("merge", *stack, "--analyze", "--rank", 4, "-o", "mix.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout.index("chance") < result.stdout.index("written")
    body = ran("merge", *stack, "--analyze", "-o", "mix2.safetensors")
    assert body["analysis"]["kind"] == "loras" and body["command"] == "merge"
    baked = ran("merge", *stack, "--analyze", "--into", "base.safetensors", "-o", "m.safetensors")
    assert baked["analysis"]["advice"]
    assert (folder / "mix.safetensors").stat().st_size, (
        "what is analysed is the plain sum, not changed by it"
    )


def test_what_is_refused(folder: Path) -> None:
    both = ("style.safetensors", "base.safetensors")
    assert "is a LoRA and base.safetensors a model" in refused("compare", *both, status=2)
    assert "needs two LoRAs or more" in refused("compare", both[0], status=2)
    assert "needs two models or more" in refused("compare", both[1], status=2)
    assert "belong to LoRAs" in refused(
        "compare", "base.safetensors", "tuned.safetensors", "--rank", 4, status=2
    )
    assert "nothing.safetensors" in refused("compare", "nothing.safetensors", both[0])
    assert "choose one" in refused(
        "merge",
        both[0],
        "third.safetensors",
        "--analyze",
        "--dry-run",
        "-o",
        "x.safetensors",
        status=2,
    )


def test_analysis_json_is_part_of_one_object(folder: Path) -> None:
    result = run(
        "merge",
        "style.safetensors",
        "third.safetensors",
        "--analyze",
        "--json",
        "-o",
        "y.safetensors",
    )
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout)["analysis"]["schema"] == 1


def test_what_a_cut_left_and_what_a_merge_is_made_of(folder: Path) -> None:
    ran("cut-blocks", "style.safetensors", "--keep", "MID,OUT03-OUT05", "-o", "cut.safetensors")
    body = ran("compare", "style.safetensors", "cut.safetensors")
    assert body["mixture"] is None and body["cut"]["name"] == "cut"
    assert [b for b, s in body["cut"]["strengths"].items() if s] == [
        "MID",
        "OUT03",
        "OUT04",
        "OUT05",
    ]
    parts = ("style.safetensors:0.8:lbw=OUTALL", "character.safetensors:0.5")
    ran("merge", *parts, "-o", "mix.safetensors")
    names = ("style.safetensors", "character.safetensors", "mix.safetensors")
    body = ran("compare", *names)
    assert body["cut"] is None and not body["mixture"]["even"]
    assert body["mixture"]["blocks"]["MID"]["shares"]["style"] == pytest.approx(0, abs=1e-3)
    text = run("compare", *names).stdout
    assert "mix is a merge with weights by block, to within 0.0" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("OUT11 ")][1:]
    assert line[:3] == ["OUT11", "0.80", "0.50"]
    even = ("compare", *names[:2], "style.safetensors:0.5")
    assert " in  " not in run(*even).stdout
