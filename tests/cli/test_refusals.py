"""Bad input: one sentence that names the file, the right exit status, no traceback, no output."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import ran, refused, tensors_of

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def header(entries: dict[str, object], data: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * data


def entry(start: int, stop: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [start, stop]}


BROKEN = {
    "empty": b"",
    "shorter than a header's length": b"\1\2",
    "giant header": struct.pack("<Q", 2**62) + b"{}",
    "header cut off": struct.pack("<Q", 500) + b'{"a":',
    "no JSON": struct.pack("<Q", 8) + b"not json",
    "overlap": header({"a": entry(0, 16), "b": entry(8, 24)}, 24),
    "hole": header({"a": entry(0, 16), "b": entry(32, 48)}, 48),
    "beyond the end": header({"a": entry(0, 16)}, 8),
    "trailing bytes": header({"a": entry(0, 16)}, 32),
    "GGUF": b"GGUF" + b"\0" * 64,
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    broken, out = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    broken.write_bytes(BROKEN[name])
    for command in (
        ["merge", broken],
        ["resize", broken, "--rank", 1],
        ["extract", broken, broken],
    ):
        words = refused(*command, "-o", out)
        assert "broken.safetensors" in words
        assert len(words.splitlines()) == 1
    assert "broken.safetensors" in refused("inspect", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def lora(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {
        "lora_up.weight": torch.ones(8, 4),
        "lora_down.weight": torch.ones(4, 8),
        "alpha": torch.tensor(4.0),
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {f"{NAME}.{role}": tensor for role, tensor in tensors.items() if tensor is not None}


WRONG = {
    "NaN": (lora(lora_up__weight=torch.full((8, 4), float("nan"))), "NaN"),
    "infinity": (lora(lora_down__weight=torch.full((4, 8), float("inf"))), "infinity"),
    "an alpha without bound": (lora(alpha=torch.tensor(1e300, dtype=torch.float64)), "alpha"),
    "values beyond fp32": (
        lora(lora_up__weight=torch.full((8, 4), 1e300, dtype=torch.float64)),
        "infinity",
    ),
    "a complex alpha": (lora(alpha=torch.tensor(1 + 0j)), "complex64"),
    "an alpha of several numbers": (lora(alpha=torch.ones(4)), "one number"),
    "an alpha of none": (lora(alpha=torch.ones(0)), "one number"),
    "integers": (lora(lora_up__weight=torch.ones(8, 4).to(torch.int8)), "floats in up"),
    "one number as a factor": (lora(lora_up__weight=torch.tensor(1.0)), "matrices"),
    "a factor of nothing": (lora(lora_up__weight=torch.ones(8, 0)), "matrices"),
    "a kernel in up": (lora(lora_up__weight=torch.ones(8, 4, 3, 3)), "1x1"),
    "a matrix as bias": (lora(diff_b=torch.ones(3, 3)), "a vector"),
    "unequal ranks": (lora(lora_up__weight=torch.ones(8, 5)), "one rank"),
    "lone up": (lora(lora_down__weight=None), "no lora_down"),
    "lone alpha": (lora(lora_up__weight=None, lora_down__weight=None), "no lora_up"),
    "DoRA without its base": (lora(dora_scale=torch.ones(8, 1)), "depends on the weight"),
    "DoRA of another size": (lora(dora_scale=torch.ones(7, 1)), "8 outputs or 8 inputs"),
    "LoRA and LoHa in one": (lora(hada_w1_a=torch.ones(8, 4)), "one kind of adapter"),
    "LoRA and LoKr in one": (lora(lokr_w1=torch.ones(2, 2)), "one kind of adapter"),
    "LoRA and a difference in one": (lora(diff=torch.ones(8, 8)), "one kind of adapter"),
    "T-LoRA": (lora(q_layer__weight=torch.ones(8, 8)), "T-LoRA"),
    "another shape": (lora(reshape_weight=torch.ones(2)), "reshape_weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_make_no_lora_are_named(tmp_path: Path, name: str) -> None:
    tensors, word = WRONG[name]
    file, out = tmp_path / "wrong.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, file)
    words = refused("merge", file, "-o", out)
    assert "wrong.safetensors" in words
    assert NAME in words or "mid_block" in words
    assert word in words and ";" in words, "it says what to do"
    assert not out.exists()


def test_a_tensor_that_nobody_claims_stops_the_command(tmp_path: Path) -> None:
    """kohya logs it and goes on; the file that comes out does less than it says."""
    file, out = tmp_path / "foreign.safetensors", tmp_path / "out.safetensors"
    save_file(lora() | {"mystery.tensor": torch.ones(3)}, file)
    words = refused("merge", file, "-o", out)
    assert "mystery.tensor" in words and "--allow-unmatched" in words
    report = ran("merge", file, "-o", out, "--allow-unmatched")
    assert any("mystery.tensor" in name for name in report["unmatched"])


def test_an_evil_pickle_runs_nothing(tmp_path: Path) -> None:
    victim, evil = tmp_path / "victim", tmp_path / "evil.ckpt"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(victim),)

    torch.save({"state_dict": {"a": Evil()}}, evil)
    words = refused("merge", evil, "-o", tmp_path / "out.safetensors")
    assert "evil.ckpt" in words
    assert not victim.exists()


def test_what_is_not_there_or_is_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "nowhere.safetensors" in refused("merge", tmp_path / "nowhere.safetensors", "-o", out)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("merge", tmp_path / "empty", "-o", out)
    assert not out.exists()


def test_a_lora_is_no_model_and_a_model_no_lora(
    sd15: Path, slim_lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert sd15.name in refused("merge", sd15, "-o", out)
    assert slim_lora.name in refused("merge", slim_lora, "--into", slim_lora, "-o", out)
    assert "needs two models, or two LoRAs" in refused(
        "extract", sd15, slim_lora, "-o", out, status=2
    )
    assert not out.exists()


def test_another_architecture_is_refused_by_name(
    sd15: Path, sd2: Path, sdxl: Path, slim_lora: Path, sdxl_lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    words = refused("merge", slim_lora, "--into", sdxl, "-o", out)
    assert "SDXL" in words and "1.x" in words
    assert "SDXL" in refused("merge", slim_lora, sdxl_lora, "-o", out)
    assert "2.x" in refused("extract", sd15, sd2, "-o", out)
    assert not out.exists()


def test_layers_without_a_place_are_listed_and_counted(
    sdxl: Path, sdxl_lora: Path, tmp_path: Path
) -> None:
    """supermerger and kohya write an unchanged text encoder and say nothing."""
    unet, out = tmp_path / "unet.safetensors", tmp_path / "out.safetensors"
    tensors = tensors_of(sdxl)
    save_file({k: t for k, t in tensors.items() if k.startswith("model.diffusion_model.")}, unet)
    words = refused("merge", sdxl_lora, "--into", unet, "-o", out)
    assert "264 layers" in words and "text_encoder" in words
    report = ran("merge", sdxl_lora, "--into", unet, "-o", out, "--allow-unmatched")
    assert len(report["unmatched"]) == 264


def test_an_output_is_never_an_input_and_replaced_only_when_asked(
    sd15: Path, slim_lora: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(slim_lora.read_bytes())
    link = tmp_path / "link.safetensors"
    link.symlink_to(mine)
    before = mine.read_bytes()
    for out in (mine, link):
        for command in (
            ["merge", mine],
            ["resize", mine, "--rank", 1],
            ["cut-blocks", mine, "--keep", "MID"],
        ):
            assert "input" in refused(*command, "-o", out, "--overwrite")
    assert bool(mine.read_bytes() == before)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"precious")
    assert "--overwrite" in refused("merge", mine, "-o", other)
    assert other.read_bytes() == b"precious"
    ran("merge", mine, "-o", other, "--overwrite")
    words = refused("merge", slim_lora, "--into", sd15, "-o", sd15, "--overwrite")
    assert "input" in words


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["merge", "{lora}:nan"], "finite"),
        (["merge", "{lora}:strong"], "strong"),
        (["merge", "{lora}:1e31"], "1e+30"),
        (["merge", "{lora}:0.5:start=10"], "start="),
        (["merge", "{lora}:lbw=OUTAL"], "OUTAL"),
        (["merge", "{lora}:lbw=1,0,1"], "IN00"),
        (["merge"], "No LoRA"),
        (["merge", "{lora}", "--rank", "4", "--into", "{lora}"], "leave them out"),
        (["merge", "{lora}", "--energy", "0.9", "--error", "0.1"], "one rank rule"),
        (["merge", "{lora}", "--energy", "1.5"], "energy"),
        (["resize", "{lora}"], "rank rule"),
        (["cut-blocks", "{lora}"], "--preset"),
        (["cut-blocks", "{lora}", "--preset", "ALL", "--drop", "MID"], "found 2"),
        (["cut-blocks", "{lora}", "--keep", "OUT99"], "OUT11"),
        (["cut-blocks", "{lora}", "--elements", "IN05:attn"], "BLOCKS:ELEMENTS:WEIGHT"),
        (["extract", "{lora}", "{lora}", "--only", "("], "regular expression"),
        (["merge", "{lora}", "--memory", "lots"], "lots"),
        (["merge", "{lora}", "--memory", "9" * 400], "no size"),
        (["merge", "{lora}", "--metadata", "novalue"], "KEY=VALUE"),
        (["merge", "{lora}", "--device", "abacus"], "abacus"),
    ],
)
def test_wrong_usage_is_status_2(
    slim_lora: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    out = tmp_path / "out.safetensors"
    given = [argument.format(lora=slim_lora) for argument in arguments]
    assert word in refused(*given, "-o", out, status=2)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "a.safetensors", "--to", "peft", "-o", ""],
        ["merge", "a.safetensors", "-o", ""],
        ["resize", "a.safetensors", "b.safetensors", "--rank", "1", "-o", ""],
        ["metadata", "set", "a.safetensors", "x=y", "-o", ""],
        ["inspect", ""],
        ["inspect", "a.safetensors", "--html", ""],
        ["compare", "a.safetensors", ""],
        ["merge", "--prompt", "<lora:a:1>", "--lora-dir", "", "-o", "x.safetensors"],
    ],
)
def test_no_name_is_not_the_current_folder(
    sd15_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """As a script has it whose variable is not set."""
    inputs = [tmp_path / "inputs" / f"{name}.safetensors" for name in "ab"]
    inputs[0].parent.mkdir()
    for file in inputs:
        file.write_bytes(sd15_lora.read_bytes())
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    given = [str(tmp_path / "inputs" / a) if a.endswith(".safetensors") else a for a in arguments]
    assert "found an empty one" in refused(*given, status=2)
    assert not list(empty.iterdir())


def test_a_cut_that_leaves_nothing_and_a_difference_of_nothing(
    slim_lora: Path, sd15: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert "nothing is left" in refused("cut-blocks", slim_lora, "--preset", "NONE", "-o", out)
    assert "Nothing is left" in refused("extract", slim_lora, slim_lora, "-o", out)
    assert "both sides" in refused("extract", sd15, sd15, "-o", out, status=2)
    assert not out.exists()


def test_no_device_or_pipe_is_replaced(slim_lora: Path, tmp_path: Path) -> None:
    """Root may rename a file to /dev/null; a link to a device is that device."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in the file system here")
    pipe, link = tmp_path / "pipe.safetensors", tmp_path / "link.safetensors"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    page = tmp_path / "pipe.html"
    os.mkfifo(page)
    for out in (pipe, link):
        for command in (
            ["merge", slim_lora, "-o", out],
            ["metadata", "set", slim_lora, "a=b", "-o", out],
            ["convert", slim_lora, "--to", "peft", "-o", out],
        ):
            assert "found a" in refused(*command, "--overwrite")
    assert "device or a pipe" in refused("inspect", slim_lora, "--html", page, "--overwrite")
    assert pipe.is_fifo() and page.is_fifo() and link.is_symlink()


def test_presets_are_a_text_of_some_size(slim_lora: Path, tmp_path: Path) -> None:
    presets, out = tmp_path / "presets.txt", tmp_path / "out.safetensors"
    command = ["merge", slim_lora, "-o", out, "--presets-file", presets]
    presets.write_bytes(b"\xff\xfeA\0:\0")
    assert "UTF-8" in refused(*command)
    with open(presets, "wb") as file:
        file.truncate(2**40)
    assert "presets.txt" in refused(*command)
    presets.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(presets)
        assert "pipe" in refused(*command)


def test_an_overflow_names_the_layer_and_the_way_out(tmp_path: Path) -> None:
    file, out = tmp_path / "large.safetensors", tmp_path / "out.safetensors"
    save_file(lora(lora_up__weight=torch.full((8, 4), 1e30)), file)
    words = refused("merge", file, "-o", out, "--dtype", "fp16")
    assert NAME in words and "--dtype fp32 or bf16" in words
    assert not out.exists()


def test_a_real_process_says_one_sentence_on_stderr(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lorakit",
        "merge",
        "nowhere.safetensors",
        "-o",
        "out.safetensors",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("lorakit: ") and len(done.stderr.splitlines()) == 1
    assert "nowhere.safetensors" in done.stderr
    command.append("-vv")
    loud = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert loud.returncode == 1 and "Traceback" in loud.stderr
    assert list(tmp_path.iterdir()) == []
