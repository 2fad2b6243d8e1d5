"""What the commands print and write: JSON, plans, quiet and loud, metadata, blocks."""

import gc
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
import torch

import lorakit
from lorakit.cli._inputs import load_stack, lora_specs
from lorakit.tensorfile import whole
from tests.helpers import (
    dense,
    lies_in,
    metadata_of,
    needs_maps,
    ran,
    run,
    tensors_of,
    weighted,
    worst_error,
)

REPORT_KEYS = {
    "schema", "command", "totals", "rows", "unmatched", "dropped", "lost", "notes", "output",
    "output_bytes", "verified", "plan", "scoring", "analysis",
}  # fmt: skip
TOTAL_KEYS = {"layers", "norm", "energy", "error", "rank_before", "rank_after"}
ROW_KEYS = {
    "module", "block", "rank_before", "rank_after", "norm", "energy", "error", "note",
    "score_kept", "score_cut",
}  # fmt: skip


def commands(base: Path, tuned: Path, lora: Path) -> dict[str, list[object]]:
    return {
        "merge": ["merge", f"{lora}:0.5"],
        "into": ["merge", lora, "--into", base],
        "extract": ["extract", base, tuned, "--rank", 2],
        "difference": ["extract", f"{lora}:0.5", lora],
        "resize": ["resize", lora, "--rank", 2],
        "cut-blocks": ["cut-blocks", lora, "--keep", "MID,OUT03-OUT08"],
    }


NAMES = ["merge", "into", "extract", "difference", "resize", "cut-blocks"]


@pytest.fixture
def arguments(
    request: pytest.FixtureRequest, sd15: Path, sd15_tuned: Path, slim_lora: Path
) -> list[object]:
    return commands(sd15, sd15_tuned, slim_lora)[request.param]


@pytest.mark.parametrize("arguments", NAMES, indirect=True)
def test_json_is_one_stable_object(arguments: list[object], tmp_path: Path) -> None:
    report = ran(*arguments, "-o", tmp_path / "out.safetensors", "--verify")
    assert report.keys() == REPORT_KEYS
    assert report["totals"].keys() == TOTAL_KEYS
    assert all(row.keys() == ROW_KEYS for row in report["rows"])
    assert report["schema"] == 1
    assert report["output_bytes"] == (tmp_path / "out.safetensors").stat().st_size
    assert report["verified"]["layers"] > 10


@pytest.mark.parametrize("arguments", NAMES, indirect=True)
def test_sharing_the_pages_of_a_file_or_copying_them_makes_the_same_bytes(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has to copy."""
    outputs = [tmp_path / folder / "out.safetensors" for folder in ("shared", "copied")]
    for output, shares in zip(outputs, (os.name == "posix", False), strict=True):
        monkeypatch.setattr(whole, "_MAPS", shares)
        ran(*arguments, "-o", output)
    assert bool(outputs[0].read_bytes() == outputs[1].read_bytes())


@needs_maps
def test_commands_share_the_pages_of_a_lora_and_the_interface_copies_them(slim_lora: Path) -> None:
    (spec,) = lora_specs([str(slim_lora)])
    loaded = load_stack([spec], presets={}).stack[0][0], lorakit.load_lora(slim_lora)
    first, second = (next(iter(lora.adapters.values())).tensors()["up"] for lora in loaded)
    assert lies_in(first, slim_lora)
    assert not lies_in(second, slim_lora)


@pytest.mark.parametrize("arguments", NAMES, indirect=True)
def test_a_dry_run_bounds_the_file_and_writes_nothing(
    arguments: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    plan = ran(*arguments, "-o", out, "--dry-run")["plan"]
    assert not list(tmp_path.iterdir())
    ran(*arguments, "-o", out)
    size = out.stat().st_size
    assert size <= plan["output_bytes"] + 20_000, "the metadata is not counted"
    assert plan["output_bytes"] < 3 * size
    assert plan["peak_bytes"] > plan["output_bytes"] - size


def test_a_dry_run_reads_headers_alone(sd15: Path, slim_lora: Path, tmp_path: Path) -> None:
    """The data is gone from this file, and the plan is the same."""
    hollow = tmp_path / "hollow.safetensors"
    size = slim_lora.stat().st_size
    length = 8 + struct.unpack("<Q", slim_lora.read_bytes()[:8])[0]
    with hollow.open("wb") as file:
        file.write(slim_lora.read_bytes()[:length])
        file.truncate(size)
    out = tmp_path / "out.safetensors"
    plans = [ran("merge", path, "-o", out, "--dry-run")["plan"] for path in (slim_lora, hollow)]
    assert plans[0] == plans[1]


def test_quiet_says_nothing_and_loud_a_line_a_layer(slim_lora: Path, tmp_path: Path) -> None:
    quiet = run("resize", slim_lora, "--rank", 2, "-o", tmp_path / "a.safetensors", "-q")
    assert quiet.output == ""
    loud = run("resize", slim_lora, "--rank", 2, "-o", tmp_path / "b.safetensors", "-v")
    modules = lorakit.load_lora(slim_lora).adapters
    assert all(module in loud.output for module in modules)
    plain = run("resize", slim_lora, "--rank", 2, "-o", tmp_path / "c.safetensors")
    assert next(iter(modules)) not in plain.output and "written" in plain.output


def test_the_metadata_is_true_of_the_file(slim_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    ran("resize", slim_lora, "--rank", 2, "-o", out, "--metadata", "note=mine")
    metadata, raw = metadata_of(out), out.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    window = raw[0x100000 : 0x100000 + 0x10000]
    assert metadata["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]
    assert metadata["ss_network_dim"] == "2"
    assert float(metadata["ss_network_alpha"]) == 2
    assert metadata["ss_tag_frequency"] == metadata_of(slim_lora)["ss_tag_frequency"]
    assert metadata["note"] == "mine"
    recipe = json.loads(metadata["lorakit.recipe"])
    hashed = metadata_of(slim_lora)["sshs_model_hash"]
    assert recipe["command"] == "resize" and recipe["options"]["rank"] == 2
    (given,) = recipe["inputs"]
    assert len(given.pop("header")) == 64
    assert given == {"lora": slim_lora.name, "sha256": hashed, "strength": "1"}


def test_no_metadata_leaves_the_hashes_alone(slim_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "bare.safetensors"
    ran("resize", slim_lora, "--rank", 2, "-o", out, "--no-metadata")
    assert metadata_of(out).keys() == {"format", "sshs_model_hash", "sshs_legacy_hash"}


def test_the_same_command_twice_gives_the_same_bytes(slim_lora: Path, tmp_path: Path) -> None:
    outs = [tmp_path / folder / "out.safetensors" for folder in ("a", "b")]
    for out in outs:
        ran("merge", f"{slim_lora}:0.3", "-o", out)
    assert bool(outs[0].read_bytes() == outs[1].read_bytes())


def test_all_is_the_identity_on_sdxl(sdxl_lora: Path, tmp_path: Path) -> None:
    """The web UI's ALL has 17 values and zeroes 30 of SDXL's 70 transformer blocks."""
    out = tmp_path / "all.safetensors"
    ran("cut-blocks", sdxl_lora, "--preset", "ALL", "-o", out)
    before, after = tensors_of(sdxl_lora), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key].to(before[key].dtype)) for key in before)


@pytest.mark.parametrize(
    ("architecture", "arguments", "kept"),
    [
        ("sdxl", ["--preset", "OUTD"], {"BASE", "OUT00", "OUT01", "OUT02"}),
        ("sdxl", ["--weights", "1,0,0,0,0,0,0,0,0,1,1,1"], {"BASE", "OUT03", "OUT04", "OUT05"}),
        ("sdxl", ["--weights", ",".join("0" * 19) + ",1"], {"OUT08"}),
        ("sdxl", ["--drop", "BASE,IN00-IN08,OUT03-OUT08"], {"MID", "OUT00", "OUT01", "OUT02"}),
        ("sd1", ["--preset", "OUTD"], {"BASE", "OUT03", "OUT04", "OUT05", "OUT06"}),
        ("sd1", ["--weights", "0,1" + ",0" * 15], {"IN01"}),
        ("sd1", ["--weights", "0,1" + ",0" * 24], {"IN00"}),
        ("sd1", ["--keep", "OUT03-OUT04,M00"], {"MID", "OUT03", "OUT04"}),
    ],
)  # fmt: skip
def test_a_cut_keeps_these_blocks_and_no_others(
    make_lora, tmp_path: Path, architecture: str, arguments: list[str], kept: set[str]
) -> None:  # type: ignore[no-untyped-def]
    path, out = make_lora(architecture, rank=2, conv=True, every=2), tmp_path / "cut.safetensors"
    lora = lorakit.load_lora(path)
    expected = {module for module in lora.adapters if lora.block(module) in kept}
    if "IN00" in kept:  # no layer that kohya trains is in IN00
        assert run("cut-blocks", path, *arguments, "-o", out).exit_code == 1
        return
    ran("cut-blocks", path, *arguments, "-o", out)
    assert set(lorakit.load_lora(out).adapters) == expected
    assert out.stat().st_size < path.stat().st_size


def test_a_cut_tells_what_share_of_the_change_it_keeps(sd15_lora: Path, tmp_path: Path) -> None:
    report = ran("cut-blocks", sd15_lora, "--keep", "MID,OUT03", "-o", tmp_path / "cut.safetensors")
    lora, exact = lorakit.load_lora(sd15_lora), dense(sd15_lora)
    squares = {m: float(delta.norm()) ** 2 for m, delta in exact.items()}
    kept = sum(s for m, s in squares.items() if lora.block(m) in {"MID", "OUT03"})
    assert report["totals"]["energy"] == pytest.approx(kept / sum(squares.values()), rel=1e-6)
    assert 0.1 < report["totals"]["energy"] < 0.5


def test_an_extraction_tells_in_a_few_words_what_it_left(
    sd15: Path, make_checkpoint, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    tuned = make_checkpoint("sd1", leftovers=True, tuning=synthetic.Tuning(rank=4, norms=True))
    out = tmp_path / "out.safetensors"
    result = run("extract", sd15, tuned, "--rank", 4, "--exclude", "BASE", "-o", out)
    words = result.stderr.splitlines()
    kinds = {line.split(" (")[0].strip() for line in words if line.startswith("  ")}
    assert kinds == {"convolutions", "norms", "biases", "text encoders"}
    assert any("--conv-rank takes them too" in line for line in words)
    count = next(line for line in words if line.startswith("changed, but not in this LoRA"))
    assert int(count.split()[-2]) > 100
    both = run("extract", sd15, tuned, "--rank", 4, "--conv-rank", 4, "-o", tmp_path / "b")
    assert "convolutions" not in both.stderr.lower()


def test_weights_scale_once_whatever_their_sign(slim_lora: Path, tmp_path: Path) -> None:
    """kohya's lbw 0.5 gives 0.25 and -1 gives +1; chop_blocks cubes."""
    out = tmp_path / "scaled.safetensors"
    ran("cut-blocks", slim_lora, "--weights", "0.5,-1" + ",1" * 15, "-o", out, "--verify")
    before, after = dense(slim_lora), dense(out)
    lora = lorakit.load_lora(slim_lora)
    scale = {"BASE": 0.5, "IN01": -1.0}
    exact = {m: scale.get(lora.block(m), 1.0) * delta for m, delta in before.items()}
    assert worst_error(after, exact) < 1e-6


def test_elements_cut_parts_of_blocks(sd15_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut.safetensors"
    ran("cut-blocks", sd15_lora, "--elements", "IN05-OUT05:attn2:0", "-o", out)
    lora, cut = lorakit.load_lora(sd15_lora), lorakit.load_lora(out)
    inside = {"IN05", "IN07", "IN08", "MID", "OUT03", "OUT04", "OUT05"}
    gone = {m for m in lora.adapters if lora.block(m) in inside and ".attn2." in m}
    assert set(lora.adapters) - set(cut.adapters) == gone and len(gone) == 28


def test_cut_blocks_list_needs_no_output(sd15_lora: Path) -> None:
    result = run("cut-blocks", "--list", sd15_lora)
    assert result.exit_code == 0 and "OUT11" in result.output and "%" in result.output


def test_a_preset_of_the_users_own(sd15_lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "lbwpresets.txt"
    file.write_text("# mine\nFACE:1,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0\n", encoding="utf-8")
    out = tmp_path / "face.safetensors"
    ran("cut-blocks", sd15_lora, "--preset", "FACE", "--presets-file", file, "-o", out)
    cut = lorakit.load_lora(out)
    assert {cut.block(module) for module in cut.adapters} == {"BASE", "OUT03", "OUT04", "OUT05"}
    assert "FACE" in run("presets", "--presets-file", file).output


def test_inspect_tells_what_a_file_is(sd15: Path, sdxl_lora: Path, sdxl_folder: Path) -> None:
    lora = json.loads(run("inspect", sdxl_lora, "--json").stdout)
    assert (lora["kind"], lora["architecture"], lora["layout"]) == ("lora", "SDXL", "kohya")
    assert (lora["layers"], lora["ranks"], lora["alphas"]) == (986, {"4": 986}, {"2": 986})
    model = json.loads(run("inspect", sd15, "--json").stdout)
    assert (model["kind"], model["architecture"]) == ("checkpoint", "Stable Diffusion 1.x")
    assert model["layout"] == "original"
    folder = json.loads(run("inspect", sdxl_folder, "--json").stdout)
    assert (folder["architecture"], folder["layout"]) == ("SDXL", "diffusers")
    both = json.loads(run("inspect", sd15, sdxl_lora, "--json").stdout)
    assert [one["kind"] for one in both] == ["checkpoint", "lora"]


def test_inspect_blocks_measures_norms_and_finds_dead_layers(make_lora, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = make_lora("sd1", rank=4)
    tensors = tensors_of(path)
    dead = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[dead].zero_()
    out = synthetic.write_lora(tmp_path / "dead.safetensors", tensors)
    found = json.loads(run("inspect", out, "--blocks", "--json").stdout)
    lora, exact = lorakit.load_lora(out), dense(out)
    whole = sum(float(delta.norm()) ** 2 for delta in exact.values())
    for block in found["blocks"]:
        inside = [exact[m] for m in exact if lora.block(m) == block["id"]]
        energy = sum(float(delta.norm()) ** 2 for delta in inside)
        assert block["norm"] == pytest.approx(energy**0.5, rel=1e-6)
        assert block["share"] == pytest.approx(energy / whole, rel=1e-6)
        assert block["layers"] == len(inside)
    assert len(found["dead"]) == 1


def test_inspect_reads_a_header_without_torch(sd15_lora: Path) -> None:
    code = (
        "import sys; sys.argv = ['lorakit', 'inspect', sys.argv[1]];"
        "import lorakit.cli as c; c.lorakit.main(standalone_mode=False);"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, sd15_lora], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_an_exact_sum_of_three(make_lora, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    paths = [make_lora("sd1", rank=3, seed=seed, te=False) for seed in (1, 2, 3)]
    out = tmp_path / "three.safetensors"
    ran("merge", *(f"{path}:0.4" for path in paths), "-o", out, "--dtype", "fp32", "--verify")
    assert worst_error(dense(out), weighted([(dense(path), 0.4) for path in paths])) < 1e-5


@pytest.mark.parametrize("arguments", NAMES, indirect=True)
def test_no_tensor_is_left_to_the_garbage_collector(
    arguments: list[object], tmp_path: Path
) -> None:
    """It comes too rarely to keep the memory down: what no longer is used must go by itself."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    control: list[object] = [torch.zeros(3)]
    control.append(control)
    del control
    try:
        ran(*arguments, "-o", tmp_path / "out.safetensors", "--verify")
        gc.collect()
        left = [thing.shape for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == [(3,)], "the control alone"
