"""lorakit verify: hashes, values, and the recipe repeated."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from lorakit.tensorfile import claims, fingerprint
from lorakit.tensorfile.differing import differences
from lorakit.tensorfile.header import read_header
from lorakit.tensorfile.source import DictSource, open_source
from tests.helpers import metadata_of, ran, refused, run, tensors_of

HASHES = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"]
KEYS = {
    "schema", "command", "file", "ok", "hashes", "tensors", "not_finite", "recipe", "inputs",
    "replay", "notes",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make files of the inputs, to be verified."""
    folder = tmp_path_factory.mktemp("written")
    a, b, base = (inputs / f"{name}.safetensors" for name in ("a", "b", "base"))
    ran("merge", f"{a}:0.7", f"{b}:-0.4", "-o", folder / "mix.safetensors")
    ran("merge", a, "--into", base, "-o", folder / "baked.safetensors")
    ran("convert", a, "--to", "peft", "-o", folder / "peft")
    return folder


@pytest.fixture
def folder(written: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Add them to a copy of the inputs, and watch the system's folder for temporary files."""
    shutil.copytree(written, folder, dirs_exist_ok=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return folder


def verified(file: str, *arguments: object, status: int = 0) -> dict[str, Any]:
    result = run("verify", file, *arguments, "--json")
    assert result.exit_code == status, result.output + repr(result.exception)
    report: dict[str, Any] = json.loads(result.stdout)
    assert report.keys() == KEYS
    assert report["ok"] == (status == 0)
    assert not list(Path(tempfile.gettempdir()).iterdir())
    return report


def hashes(report: dict[str, Any]) -> dict[str, str]:
    return {entry["key"]: entry["verdict"] for entry in report["hashes"]}


def test_an_intact_file(folder: Path) -> None:
    report = verified("mix.safetensors")
    assert hashes(report) == dict(zip(HASHES, ["right", "right", "absent"], strict=True))
    assert report["schema"] == 1 and report["file"] == "mix.safetensors"
    assert report["recipe"] == {"command": "merge", "lorakit": __import__("lorakit").__version__}
    assert [(one["name"], one["verdict"]) for one in report["inputs"]] == [
        ("a.safetensors", "found"),
        ("b.safetensors", "found"),
    ]
    assert report["replay"] == {"verdict": "same", "why": "", "differs": []}
    assert report["not_finite"] == [] and report["notes"] == []
    assert report["tensors"] == len(tensors_of(Path("mix.safetensors")))
    assert report == verified("mix.safetensors"), "twice the same"


@pytest.mark.parametrize("file", ["baked.safetensors", "peft"])
def test_checkpoints_and_folders(folder: Path, file: str) -> None:
    assert verified(file)["replay"]["verdict"] == "same"


def test_one_flipped_bit_in_a_tensor(folder: Path) -> None:
    for name in ("mix", "baked", "peft/unet/adapter_model"):
        path = Path(f"{name}.safetensors")
        header = read_header(path)
        key = list(header.specs)[-1]
        raw = bytearray(path.read_bytes())
        raw[header.extents[key].offset] ^= 1
        path.write_bytes(raw)
        report = verified("peft" if "/" in name else str(path), status=1)
        (differs,) = report["replay"]["differs"]
        assert report["replay"]["verdict"] == "differs" and differs.endswith(key)
        where = "unet: " if "/" in name else ""
        verdict = hashes(report)[f"{where}sshs_model_hash"]
        assert verdict == ("absent" if name == "baked" else "wrong")
    shown = run("verify", "mix.safetensors")
    assert shown.exit_code == 1
    assert "in one place, lora_" in shown.stdout and "wrong" in shown.stdout


@pytest.mark.parametrize("key", HASHES)
def test_a_wrong_hash(folder: Path, key: str) -> None:
    path = Path("mix.safetensors")
    save_file(tensors_of(path), path, {**metadata_of(path), key: "0" * 8})
    report = verified("mix.safetensors", status=1)
    assert hashes(report)[key] == "wrong"
    entry = next(entry for entry in report["hashes"] if entry["key"] == key)
    assert entry["stored"] == "0" * 8 and len(entry["found"]) >= 8
    # A replay computes the hashes of kohya itself and drops modelspec's.
    assert report["replay"]["differs"] == [f"metadata {key}"]


def test_modelspecs_hash_is_of_the_tensors(folder: Path) -> None:
    path = Path("a.safetensors")
    header = read_header(path)
    digest = hashlib.sha256(path.read_bytes()[header.data_start :]).hexdigest()
    for text in (f"0x{digest}", digest.upper()):
        metadata = {**metadata_of(path), "modelspec.hash_sha256": text}
        save_file(tensors_of(path), path, metadata)
        assert hashes(verified("a.safetensors"))["modelspec.hash_sha256"] == "right"


def test_kohyas_short_hash_is_of_a_file_with_less_metadata(folder: Path) -> None:
    """Its trainer hashes the file before modelspec's keys come in."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "lora_unet_x.lora_down.weight": torch.randn(4, 90_000, generator=generator),
        "lora_unet_x.lora_up.weight": torch.randn(5, 4, generator=generator),
    }
    trained = {"ss_network_dim": "4", "ss_tag_frequency": '{"é": 3}'}
    short = hashlib.sha256(save(tensors, trained)[0x100000:0x110000]).hexdigest()[:8]
    metadata = {**trained, "sshs_legacy_hash": short, "modelspec.title": "x" * 300}
    path = Path("kohya.safetensors")
    save_file(tensors, path, metadata)
    (claim,) = claims.check_claims(open_source(path))
    assert claim.right and claim.found != short
    save_file({key: -tensor for key, tensor in tensors.items()}, path, metadata)
    (claim,) = claims.check_claims(open_source(path))
    assert not claim.right


def test_hashes_of_the_base_do_not_outlive_it(folder: Path) -> None:
    base = Path("base.safetensors")
    stale = dict.fromkeys(HASHES, "0" * 64)
    save_file(tensors_of(base), base, {**metadata_of(base), **stale, "title": "mine"})
    ran("merge", "a.safetensors", "--into", base, "-o", "x.safetensors")
    assert metadata_of(Path("x.safetensors")).keys() == {"title", "lorakit.recipe"}
    assert verified("x.safetensors")["replay"]["verdict"] == "same"


def test_values_that_are_not_finite(folder: Path) -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
    tensors = {str(dtype): torch.tensor([1.0, float("nan")]).to(dtype) for dtype in dtypes}
    fine = {"fine": torch.ones(2), "whole": torch.ones(2, dtype=torch.int64)}
    save_file({**tensors, **fine}, "odd.safetensors")
    report = verified("odd.safetensors", status=1)
    assert set(report["not_finite"]) == set(tensors)
    save_file(fine, "fine.safetensors")
    assert verified("fine.safetensors")["not_finite"] == []


def test_missing_inputs_are_no_fault_of_the_file(folder: Path) -> None:
    Path("loras/deep").mkdir(parents=True)
    shutil.move("a.safetensors", "loras/deep")
    shutil.copy("base.safetensors", "b.safetensors")
    report = verified("mix.safetensors")
    assert [one["verdict"] for one in report["inputs"]] == ["missing", "other content"]
    assert report["replay"]["verdict"] == "not done"
    assert "a.safetensors, b.safetensors" in report["replay"]["why"]
    report = verified("mix.safetensors", "--lora-dir", "loras")
    assert [one["verdict"] for one in report["inputs"]] == ["found", "other content"]
    assert "without b.safetensors" in report["replay"]["why"]


def test_without_a_recipe_there_is_nothing_to_repeat(folder: Path) -> None:
    report = verified("a.safetensors")
    assert report["recipe"] is None and report["inputs"] == []
    assert report["replay"] == {
        "verdict": "not done", "why": "no recipe in the metadata", "differs": [],
    }  # fmt: skip
    shown = run("verify", "a.safetensors")
    assert shown.exit_code == 0 and "no recipe in the metadata" in shown.stdout


def test_a_replay_may_be_left_out(folder: Path) -> None:
    report = verified("mix.safetensors", "--no-replay")
    assert report["replay"]["verdict"] == "not done"
    assert hashes(report)["sshs_model_hash"] == "right"


def with_recipe(path: Path, **changes: object) -> None:
    recipe = {**json.loads(metadata_of(path)["lorakit.recipe"]), **changes}
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    save_file(tensors_of(path), path, {**metadata_of(path), "lorakit.recipe": text})


def test_a_recipe_that_tells_another_story(folder: Path) -> None:
    path = Path("mix.safetensors")
    inputs = json.loads(metadata_of(path)["lorakit.recipe"])["inputs"]
    with_recipe(path, inputs=[{**inputs[0], "strength": "0.8"}, inputs[1]])
    report = verified("mix.safetensors", status=1)
    assert hashes(report)["sshs_model_hash"] == "right"
    differs = report["replay"]["differs"]
    assert "metadata sshs_model_hash" in differs and differs[0].startswith("lora_")


def test_a_recipe_of_another_version_is_tried(folder: Path) -> None:
    with_recipe(Path("mix.safetensors"), lorakit="0.0.9")
    report = verified("mix.safetensors", status=1)
    assert report["replay"]["differs"] == ["metadata lorakit.recipe"]
    assert "0.0.9" in report["notes"][0]


def test_a_recipe_that_cannot_be_followed_is_not(folder: Path) -> None:
    with_recipe(Path("mix.safetensors"), command="conjure")
    report = verified("mix.safetensors")
    assert report["replay"]["verdict"] == "not done" and "conjure" in report["replay"]["why"]


def test_a_replay_that_fails_leaves_nothing_behind(folder: Path) -> None:
    path = Path("baked.safetensors")
    options = json.loads(metadata_of(path)["lorakit.recipe"])["options"]
    with_recipe(path, options={**options, "rank": 4})
    report = verified("baked.safetensors", status=1)
    assert report["replay"]["verdict"] == "failed" and "Rank rules" in report["replay"]["why"]


def test_what_is_no_such_file_is_refused(folder: Path) -> None:
    Path("broken.safetensors").write_bytes(b"\0" * 100)
    assert "broken.safetensors" in refused("verify", "broken.safetensors")
    refused("verify", "nothing.safetensors", status=2)
    assert "nowhere" in refused("verify", "mix.safetensors", "--lora-dir", "nowhere")


def test_quiet_says_nothing(folder: Path) -> None:
    assert run("verify", "mix.safetensors", "-q").output == ""


def test_every_kind_of_difference_is_named(folder: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.zeros(2, 3), "c": torch.ones(1)}
    metadata = {"x": "1"}
    first, second = Path("first.safetensors"), Path("second.safetensors")

    def found(**changes: Any) -> tuple[str, ...]:
        said = changes.pop("metadata", metadata)
        save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, second, said)
        return differences(first, second)

    save_file(tensors, first, metadata)
    assert found() == ()
    assert found(b=torch.tensor([[0, 0, 0], [0, 0, 1e-45]])) == ("b",)
    assert found(b=torch.zeros(3, 2), c=None) == ("b", "c")
    assert found(d=torch.ones(1)) == ("d",)
    assert found(metadata={"x": "2", "y": "3"}) == ("metadata x", "metadata y")
    raw = first.read_bytes()
    start = read_header(first).data_start
    spaced = json.dumps(json.loads(raw[8:start])).encode()
    second.write_bytes(len(spaced).to_bytes(8, "little") + spaced + raw[start:])
    assert differences(first, second) == ("the header's spelling",)


def test_a_change_anywhere_in_a_model_changes_its_sample() -> None:
    """A tuning moves every layer; what lies between two samples may differ unseen."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(300, 700, generator=generator) for i in range(8)}
    plain = fingerprint.sample_hash(DictSource(tensors))
    assert plain == fingerprint.sample_hash(DictSource(dict(tensors)))
    for key, tensor in tensors.items():
        assert fingerprint.sample_hash(DictSource({**tensors, key: tensor + 1})) != plain
    assert fingerprint.sample_hash(DictSource({})) == hashlib.sha256().hexdigest()
    headers = {
        fingerprint.header_hash(DictSource({**tensors, **more}, metadata), texts)
        for more, metadata, texts in (
            ({}, {}, {}),
            ({"t0": torch.zeros(700, 300)}, {}, {}),
            ({"t0": torch.zeros(300, 700).half()}, {}, {}),
            ({"more": torch.zeros(1)}, {}, {}),
            ({}, {"a": "b"}, {}),
            ({}, {}, {"config": "{}"}),
        )
    }
    assert len(headers) == 6


def test_the_sample_of_a_file_is_that_of_its_tensors(folder: Path) -> None:
    path = Path("base.safetensors")
    source = open_source(path)
    memory = DictSource({key: source.get(key) for key in source.specs})
    assert fingerprint.sample_hash(source) == fingerprint.sample_hash(memory)
