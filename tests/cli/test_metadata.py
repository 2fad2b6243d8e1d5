"""What `lorakit metadata` shows, changes and checks; the tensors' bytes stay as they are."""

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
import torch
from safetensors.torch import save_file

import lorakit
from lorakit.errors import OutputError
from lorakit.tensorfile import relabel
from lorakit.tensorfile.header import format_header, read_header
from tests.helpers import metadata_of, ran, refused, run, tensors_of

MIB = 2**20


@pytest.fixture
def lora(sd15_lora: Path, tmp_path: Path) -> Path:
    """Return a LoRA of more than 1 MiB with all of its hashes true."""
    tensors = tensors_of(sd15_lora) | {
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.randn(600, 600),
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.randn(600, 600),
    }
    told = {"ss_output_name": "mine", "ss_v2": "False", "format": "pt", "note": "a=b"}
    path = synthetic.write_lora(tmp_path / "lora.safetensors", tensors, told)
    ran("metadata", "hash", path, "--in-place")
    return path


def data_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + struct.unpack("<Q", raw[:8])[0] :]


def legacy(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()[MIB : MIB + 2**16]).hexdigest()[:8]


def right(path: Path) -> bool:
    """Tell whether a file's hashes are there and true, by their definitions."""
    told = metadata_of(path)
    tensors = hashlib.sha256(data_of(path)).hexdigest()
    return (told["sshs_model_hash"], told["sshs_legacy_hash"]) == (tensors, legacy(path))


def test_hashes_are_written_and_are_those_of_the_file(lora: Path) -> None:
    assert right(lora) and lora.stat().st_size > MIB + 2**16
    lora.write_bytes(lora.read_bytes()[:-1] + b"?")
    assert not right(lora)


def test_set_keeps_the_tensors_bytes_and_all_other_keys(lora: Path, tmp_path: Path) -> None:
    before, data, out = metadata_of(lora), data_of(lora), tmp_path / "out.safetensors"
    report = ran("metadata", "set", lora, "note=c=d", "title=ünï", "empty=", "-o", out)
    assert report["set"].keys() == {"note", "title", "empty", "sshs_legacy_hash"}
    assert report["removed"] == [] and report["output_bytes"] == out.stat().st_size
    after = metadata_of(out)
    assert (after["note"], after["title"], after["empty"]) == ("c=d", "ünï", "")
    kept = before.keys() - {"note", "sshs_legacy_hash"}
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert bool(data_of(out) == data) and right(out)
    assert metadata_of(lora) == before, "the input stays"


def test_set_in_place_replaces_the_file_itself(lora: Path) -> None:
    lora.chmod(0o640)
    data = data_of(lora)
    done = run("metadata", "set", lora, "note=x", "--in-place")
    assert done.exit_code == 0 and "a=b -> x" in done.output
    assert bool(data_of(lora) == data) and right(lora)
    assert metadata_of(lora)["note"] == "x"
    assert stat.S_IMODE(lora.stat().st_mode) == 0o640
    assert [p.name for p in lora.parent.iterdir()] == [lora.name]


def test_a_link_stays_a_link(lora: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(lora)
    ran("metadata", "set", link, "note=x", "--in-place")
    assert link.is_symlink() and metadata_of(lora)["note"] == "x"


def test_remove_takes_keys_and_patterns(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = ran("metadata", "remove", lora, "ss_*", "note", "-o", out)
    assert report["removed"] == ["note", "ss_output_name", "ss_v2"]
    assert metadata_of(out).keys() == {"format", "sshs_model_hash", "sshs_legacy_hash"}
    assert bool(data_of(out) == data_of(lora)) and right(out)
    ran("metadata", "remove", lora, "*", "-o", out, "--overwrite")
    assert metadata_of(out) == {} and bool(data_of(out) == data_of(lora))
    assert ran("metadata", "show", out)["metadata"] == {}
    assert "has no metadata" in run("metadata", "show", out).output
    said = refused("metadata", "remove", lora, "ss_nothing", "--in-place", status=2)
    assert "expected a key 'ss_nothing' to remove, found format, note" in said


def test_a_file_of_safetensors_reads_the_same(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    ran("metadata", "set", lora, f"note={'x' * 5000}", "-o", out)
    before, after = tensors_of(lora), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_bytes_keep_their_order_also_off_the_grid(tmp_path: Path) -> None:
    """A writer would reorder this file, and its AutoV3 would be another one."""
    specs = {"a": ("U8", [3]), "b": ("F32", [2])}
    data = bytes(range(11))
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    ran("metadata", "set", path, "a=b", "--in-place")
    assert data_of(path) == data and list(read_header(path).specs) == list(specs)
    ran("metadata", "hash", path, "--in-place")
    assert metadata_of(path)["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert run("metadata", "hash", path).exit_code == 0


def test_hash_compares_and_mends(lora: Path) -> None:
    report = ran("metadata", "hash", lora)
    assert [(one["key"], one["verdict"]) for one in report["hashes"]] == [
        ("sshs_model_hash", "right"),
        ("sshs_legacy_hash", "right"),
    ]
    raw = bytearray(lora.read_bytes())
    raw[-1] ^= 1
    raw[MIB] ^= 1
    lora.write_bytes(raw)
    done = run("metadata", "hash", lora)
    assert done.exit_code == 1 and done.output.count("wrong") == 2
    assert hashlib.sha256(data_of(lora)).hexdigest() in done.output
    assert run("metadata", "hash", lora, "-q").output == ""
    ran("metadata", "hash", lora, "--in-place")
    assert right(lora) and run("metadata", "hash", lora).exit_code == 0


def test_hash_tells_what_is_not_stored(sd15_lora: Path, tmp_path: Path) -> None:
    path = synthetic.write_lora(tmp_path / "a.safetensors", tensors_of(sd15_lora))
    report = ran("metadata", "hash", path)
    assert [one["verdict"] for one in report["hashes"]] == ["absent", "absent"]
    assert report["hashes"][0]["found"] == hashlib.sha256(data_of(path)).hexdigest()
    assert report["hashes"][1]["found"] == legacy(path)


def test_modelspecs_hash_is_kept_true(lora: Path) -> None:
    stored = relabel.open_stored(lora)
    told = {**stored.header.metadata, "modelspec.hash_sha256": "0x12"}
    relabel.rewritten(stored, told, place=lora)
    assert run("metadata", "hash", lora).exit_code == 1
    ran("metadata", "hash", lora, "--in-place")
    digest = hashlib.sha256(data_of(lora)).hexdigest()
    assert metadata_of(lora)["modelspec.hash_sha256"] == f"0x{digest}"
    assert run("metadata", "hash", lora).exit_code == 0


def test_kohyas_legacy_hash_is_right_too(lora: Path) -> None:
    """kohya takes it of the tensors below a header that holds nothing but `ss_…`."""
    header = read_header(lora)
    trained = {k: v for k, v in header.metadata.items() if k.startswith("ss_")}
    whole = format_header(header.specs, trained) + data_of(lora)
    theirs = hashlib.sha256(whole[MIB : MIB + 2**16]).hexdigest()[:8]
    assert theirs != header.metadata["sshs_legacy_hash"]
    told = {**header.metadata, "sshs_legacy_hash": theirs}
    raw = format_header(header.specs, told) + data_of(lora)
    lora.write_bytes(raw)
    assert run("metadata", "hash", lora).exit_code == 0 and not right(lora)
    ran("metadata", "set", lora, "note=longer than it was before", "--in-place")
    assert run("metadata", "hash", lora).exit_code == 0 and right(lora)


@pytest.mark.parametrize("size", [MIB - 9000, MIB - 200, MIB + 100, MIB + 2**16 + 9000])
def test_the_legacy_hash_is_true_wherever_the_header_ends(lora: Path, size: int) -> None:
    """It is left out where it would lie in the bytes that it is of."""
    ran("metadata", "set", lora, f"a={'x' * (size - 60000)}", f"z={'y' * 500}", "--in-place")
    assert bool(lora.read_bytes()[8:10] == b'{"')
    told = metadata_of(lora)
    place = lora.read_bytes().find(b'"sshs_legacy_hash":"')
    if "sshs_legacy_hash" in told:
        assert told["sshs_legacy_hash"] == legacy(lora)
        assert place + 28 <= MIB or place >= MIB + 2**16
    ran("metadata", "hash", lora, "--in-place")
    assert ("sshs_legacy_hash" in metadata_of(lora)) == ("sshs_legacy_hash" in told)
    assert told["sshs_model_hash"] == hashlib.sha256(data_of(lora)).hexdigest()


def test_a_header_that_holds_its_own_window_has_no_legacy_hash(lora: Path) -> None:
    """The key's own place is steered into the window by what sorts before it."""
    ran("metadata", "set", lora, f"a={'x' * (MIB + 1000)}", "--in-place")
    assert "sshs_legacy_hash" not in metadata_of(lora)
    ran("metadata", "remove", lora, "a", "--in-place")
    ran("metadata", "hash", lora, "--in-place")
    assert right(lora)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["set", "LORA", "a=b"], "Name an output with -o"),
        (["set", "LORA", "a=b", "-o", "OUT", "--in-place"], "Name an output with -o"),
        (["remove", "LORA", "note"], "Name an output with -o"),
        (["set", "LORA", "a", "--in-place"], "'a': expected KEY=VALUE"),
        (["set", "LORA", "=a", "--in-place"], "expected KEY=VALUE"),
        (["set", "LORA", "sshs_model_hash=1", "--in-place"], "is computed, not set"),
        (["set", "LORA", "modelspec.hash_sha256=1", "--in-place"], "is computed, not set"),
    ],
)
def test_wrong_usage_is_refused(
    lora: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "out.safetensors"
    places = {"LORA": str(lora), "OUT": str(out)}
    before = lora.read_bytes()
    assert said in refused("metadata", *(places.get(a, a) for a in arguments), status=2)
    assert bool(lora.read_bytes() == before) and not out.exists()


def test_an_output_is_never_the_input_and_never_replaced_unasked(
    lora: Path, tmp_path: Path
) -> None:
    before, link = lora.read_bytes(), tmp_path / "link.safetensors"
    link.symlink_to(lora)
    for out in (lora, link):
        said = refused("metadata", "set", lora, "a=b", "-o", out, "--overwrite")
        assert "inputs are never replaced" in said
    link.unlink()
    link.write_bytes(b"mine")
    assert "use --overwrite" in refused("metadata", "set", lora, "a=b", "-o", link)
    assert link.read_bytes() == b"mine" and bool(lora.read_bytes() == before)


def test_a_broken_file_stays_as_it_is(lora: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(lora.read_bytes()[:-1])
    before = broken.read_bytes()
    assert "cut off" in refused("metadata", "set", broken, "a=b", "--in-place")
    assert bool(broken.read_bytes() == before)
    pickled = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2)}, pickled)
    assert "expected a safetensors file" in refused("metadata", "show", pickled)
    assert run("metadata", "show", tmp_path).exit_code == 2
    assert run("metadata", "show", tmp_path / "none.safetensors").exit_code == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_told(lora: Path) -> None:
    lora.parent.chmod(0o500)
    try:
        assert "expected to write the output" in refused(
            "metadata", "set", lora, "a=b", "--in-place"
        )
    finally:
        lora.parent.chmod(0o700)


def test_a_read_only_file_stays_as_it_is(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename would replace it all the same; and root may write anything."""
    before = lora.read_bytes()
    lora.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    said = refused("metadata", "set", lora, "a=b", "--in-place")
    assert "found one that is read-only" in said and bool(lora.read_bytes() == before)
    assert run("metadata", "set", lora, "a=b", "-o", lora.with_name("b.safetensors")).exit_code == 0


def test_values_of_any_size_and_script_come_back(lora: Path) -> None:
    told = {"é": "猫 😀 \u2028 \x7f", "line": 'a\nb\t"c"\\', "long": "x" * 3_000_000}
    data = data_of(lora)
    lorakit.edit_metadata(lora, values=told)
    assert metadata_of(lora).items() >= told.items() and bool(data_of(lora) == data)
    assert run("metadata", "show", lora).exit_code == 0
    with pytest.raises(OutputError, match="store less metadata"):
        lorakit.edit_metadata(lora, values={"huge": "x" * 100_000_001})
    with pytest.raises(OutputError, match="valid Unicode"):
        lorakit.edit_metadata(lora, values={"half": "\ud800"})
    assert metadata_of(lora).items() >= told.items() and bool(data_of(lora) == data)
    assert [p.name for p in lora.parent.iterdir()] == [lora.name]


def test_show_is_of_words_and_json_as_it_is_stored(lora: Path) -> None:
    ran("metadata", "set", lora, 'ss_tag_frequency={"a": {"cat": 3}}', "--in-place")
    text, told = run("metadata", "show", lora).output, ran("metadata", "show", lora)
    assert "cat (3)" in text and "ss_tag_frequency" in text
    assert told["metadata"] == metadata_of(lora)
    assert told.keys() == {"schema", "command", "file", "metadata"} and told["schema"] == 1


def test_a_checkpoint_has_metadata_too(sdxl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    ran("metadata", "set", sdxl, "modelspec.title=mine", "-o", out)
    assert metadata_of(out) == {"modelspec.title": "mine"}
    assert bool(data_of(out) == data_of(sdxl))


def test_a_file_without_tensors_or_metadata(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    ran("metadata", "set", path, "a=b", "--in-place")
    assert metadata_of(path) == {"a": "b"}
    assert run("metadata", "hash", path).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [["show"], ["set", "a=b", "--in-place"], ["remove", "note", "--in-place"], ["hash"]],
)
def test_nothing_of_it_needs_torch(lora: Path, arguments: list[str]) -> None:
    code = (
        "import sys; import lorakit.cli as c; c.lorakit.main(sys.argv[1:], standalone_mode=False);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "metadata", arguments[0], lora, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
