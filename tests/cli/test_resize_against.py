"""resize --against on the command line: options, tables, JSON, recipes, refusals."""

import json
from pathlib import Path

import pytest

from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import load_lora
from lorakit.operations.resize import resize
from lorakit.tensorfile.source import open_source
from tests.cli.inputs import recipe_of
from tests.cli.test_recipe import repeats
from tests.helpers import dense, metadata_of, ran, refused, run, worst_error

ON_BASE = ["--against", "base.safetensors"]
THRESHOLD = ["--threshold", "-2.2"]


def test_the_default_score_is_the_frobenius_norm_and_help_says_so(folder: Path) -> None:
    given = ["resize", "a.safetensors", *ON_BASE, *THRESHOLD]
    report = ran(*given, "-o", "x.safetensors")
    ran(*given, "--score", "fro-ckpt", "-o", "y/x.safetensors")
    assert bool(Path("x.safetensors").read_bytes() == Path("y/x.safetensors").read_bytes())
    scoring = report["scoring"]
    assert scoring["score"] == "fro-ckpt" and scoring["against"].endswith("base.safetensors")
    assert scoring["lowest_kept"] >= -2.2 > scoring["highest_cut"]
    assert recipe_of(Path("x.safetensors"))["options"]["score"] == "fro-ckpt"  # type: ignore[index, call-overload]
    words = " ".join(run("resize", "--help").output.split())
    assert "If left out, --threshold and --size take fro-ckpt" in words
    found, _ = resize(
        load_lora("a.safetensors"),
        rule=RankRule(threshold=-2.2),
        against=open_source("base.safetensors"),
    )
    assert worst_error(dense(Path("x.safetensors")), dense(found)) < 1e-3


def test_with_v_every_layer_has_a_row_with_both_scores(folder: Path) -> None:
    given = ["resize", "a.safetensors", *ON_BASE, *THRESHOLD, "--overwrite", "-o", "x.safetensors"]
    report = ran(*given)
    rows = {row["module"]: row for row in report["rows"]}
    assert any(row["rank_after"] == 0 for row in rows.values()), "layers may lose all"
    lines = run(*given, "-v").output.splitlines()
    (head,) = [line for line in lines if line.startswith("block ")]
    assert head.endswith("  layer") and "last score" in head and "cut from" in head
    told = {line.split()[-1]: line for line in lines if line.split() and line.split()[-1] in rows}
    assert told.keys() == rows.keys()
    for module, row in rows.items():
        assert f"{row['rank_before']} -> {row['rank_after']}" in told[module]
        for score in (row["score_kept"], row["score_cut"]):
            assert score is None or f"{score:.4g}" in told[module]
    (summary,) = [line for line in lines if line.startswith("score ")]
    assert "fro-ckpt of base.safetensors, last kept -2." in summary
    plain = run("resize", "a.safetensors", "--rank", 2, "-v", "-o", "z.safetensors").output
    assert "last score" not in plain and "\nscore" not in plain


def test_json_keeps_its_schema(folder: Path) -> None:
    report = ran("resize", "a.safetensors", *ON_BASE, *THRESHOLD, "-o", "x.safetensors")
    assert report["schema"] == 1
    assert set(report["scoring"]) == {
        "score", "against", "rescale", "threshold", "lowest_kept", "highest_cut",
    }  # fmt: skip
    plain = ran("resize", "a.safetensors", "--rank", 1, "-o", "y.safetensors")
    assert plain["scoring"] is None
    assert all(row["score_kept"] is row["score_cut"] is None for row in plain["rows"])
    assert report.keys() == plain.keys()


def test_against_alone_is_what_a_kind_is_taken_on(folder: Path) -> None:
    """No score without a threshold, a size or --score; both meanings together work."""
    plain = ran("resize", "dora.safetensors", *ON_BASE, "--rank", 1, "-o", "x.safetensors")
    assert plain["scoring"] is None
    both = ran("resize", "dora.safetensors", *ON_BASE, "--threshold", -3, "-o", "y.safetensors")
    assert both["scoring"]["score"] == "fro-ckpt"
    given = ["resize", "dora.safetensors", "--score", "spn-lora", "--threshold", -1]
    assert "name the model with --against" in refused(*given, "-o", "z.safetensors")


def test_a_score_of_the_lora_alone_needs_no_model(folder: Path) -> None:
    """spn-lora is kohya's sv_ratio: σ₁ / σ of at most 10^-threshold."""
    ran(
        "resize", "a.safetensors", "--score", "spn-lora", "--threshold", -0.3, "-o", "x.safetensors"
    )
    ran("resize", "a.safetensors", "--sv-ratio", 10**0.3, "-o", "y.safetensors")
    assert worst_error(dense(Path("x.safetensors")), dense(Path("y.safetensors"))) == 0.0


SAID: dict[str, list[object]] = {
    "threshold": [*THRESHOLD],
    "score": ["--score", "spn-ckpt=0.7,fro_lora=0.3", "--threshold", "-1.2", "--rank", 3],
    "subspace": ["--score", "subspace", "--size", "60K", "--dtype", "fp32"],
    "rescale": [*THRESHOLD, "--rescale", 1.7],
}


@pytest.mark.parametrize("name", SAID)
def test_a_recipe_repeats(folder: Path, name: str) -> None:
    repeats(folder, "resize", "b.safetensors", *ON_BASE, *SAID[name])


def test_rescale_is_in_the_file_and_verified(folder: Path) -> None:
    given = ["resize", "a.safetensors", *ON_BASE, "--threshold", -9, "--dtype", "fp32"]
    ran(*given, "-o", "x.safetensors")
    report = ran(*given, "--rescale", 0.5, "--verify", "-o", "y.safetensors")
    assert report["verified"]["largest"] < 1e-5
    half = {m: 0.5 * delta for m, delta in dense(Path("x.safetensors")).items()}
    assert worst_error(dense(Path("y.safetensors")), half) < 1e-5


@pytest.mark.parametrize("score", ["fro-ckpt", "spn-ckpt", "subspace"])
def test_several_files_are_as_one_by_one(folder: Path, score: str) -> None:
    given = [*ON_BASE, "--score", score, "--size", "60K"]
    result = run(
        "resize", "a.safetensors", "b.safetensors", *given, "-o", "all", "--json", "--verify"
    )
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)
    assert [report["scoring"]["score"] for report in reports] == [score] * 2
    for name in ("a", "b"):
        ran("resize", f"{name}.safetensors", *given, "-o", f"one/{name}.safetensors")
        both = [Path(place, f"{name}.safetensors") for place in ("all", "one")]
        assert bool(both[0].read_bytes() == both[1].read_bytes())
        assert both[0].stat().st_size <= 60 * 1024


def test_what_reaches_no_threshold_is_not_written_and_listed(folder: Path) -> None:
    report = ran("resize", "a.safetensors", *ON_BASE, *THRESHOLD, "-o", "x.safetensors", "--verify")
    gone = [row["module"] for row in report["rows"] if row["rank_after"] == 0]
    assert gone and report["dropped"] == gone
    assert not set(gone) & set(load_lora("x.safetensors").adapters)
    ranks = {adapter.rank for adapter in load_lora("x.safetensors").adapters.values()}
    assert len(ranks) == 1
    assert metadata_of(Path("x.safetensors"))["ss_network_dim"] == str(*ranks)


def test_a_dry_run_finds_what_the_model_lacks(folder: Path) -> None:
    given = ["resize", "a.safetensors", "--against", "pipeline/unet", *THRESHOLD]
    for more in ([], ["--dry-run"]):
        words = refused(*given, "-o", "x.safetensors", *more)
        assert "text_encoder." in words and "--allow-unmatched" in words
    report = ran(*given, "-o", "x.safetensors", "--allow-unmatched")
    assert any("have no score" in note for note in report["notes"])
    plan = ran("resize", "a.safetensors", *ON_BASE, *THRESHOLD, "-o", "y.safetensors", "--dry-run")
    assert plan["plan"]["output_bytes"] > Path("x.safetensors").stat().st_size
    assert not Path("y.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--threshold"),
        (THRESHOLD, "--against"),
        (["--score", "fro-ckpt", *THRESHOLD], "--against"),
        ([*ON_BASE, "--score", "size", *THRESHOLD], "is no score"),
        ([*ON_BASE, *THRESHOLD, "--energy", 0.9], "energy and threshold"),
        ([*ON_BASE, "--score", "fro-ckpt", "--energy", 0.9], "--energy goes by"),
        ([*ON_BASE, "--threshold", "nan"], "threshold must lie between"),
        ([*ON_BASE, *THRESHOLD, "--rescale", -1], "rescale must be above 0"),
    ],
)
def test_wrong_usage_is_said_in_one_sentence(folder: Path, given: list[object], words: str) -> None:
    said = refused("resize", "a.safetensors", *given, "-o", "x.safetensors", status=2)
    assert words in said and len(said.splitlines()) == 1
    assert not Path("x.safetensors").exists()
