"""Files made to harm: no word of theirs steers the terminal, leads elsewhere, or stops the tool."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import OutputError
from lorakit.tensorfile.source import DictSource
from lorakit.tensorfile.writer import write_folder
from tests.helpers import metadata_of, ran, refused, run, tensors_of

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DIFFUSERS = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
EVIL = {
    "escape": "e\x1b[2J\x1b]0;title\x07",
    "line": "a\nb\rc",
    "markup": "[/red]",
    "open markup": "[bold][link=http://example.com]x",
    "right to left": "\u202eabc\u202c",
    "null": "a\0b",
    "C1": "a\x9b2Jb",
}


def lora(key: str = LAYER) -> dict[str, Tensor]:
    return {
        f"{key}.lora_up.weight": torch.ones(8, 4),
        f"{key}.lora_down.weight": torch.ones(4, 8),
        f"{key}.alpha": torch.tensor(4.0),
    }


def check_plain(result: Result) -> None:
    """Check that nothing in an output steers a terminal, and that nothing went wrong inside."""
    assert result.exit_code in (0, 1, 2), result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    odd = {c for c in result.output if not c.isprintable() and c != "\n"}
    assert not odd
    if result.exit_code == 1 and result.output.startswith("Error"):
        assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("name", EVIL)
def test_names_and_values_from_a_file_do_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # As a terminal gets it: where none is, escapes are stripped on the way.
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *args, **kwargs: False)
    evil = EVIL[name]
    recipe = {"lorakit": evil, "command": "merge", "inputs": [], "options": {"method": evil}}
    told = {evil: evil, "ss_output_name": evil, "ss_tag_frequency": json.dumps({"d": {evil: 3}}),
            "modelspec.title": evil, "lorakit.recipe": json.dumps(recipe),
            "sshs_model_hash": evil}  # fmt: skip
    save_file(lora(evil), "module.safetensors", told)
    save_file(lora() | {evil: torch.ones(2)}, "foreign.safetensors", told)
    save_file({evil: torch.ones(2, 2), f"{evil}.weight": torch.ones(3, 3)}, "model.safetensors")
    for command in (
        ["merge", "module.safetensors", "-o", "a.safetensors", "-v"],
        ["merge", "foreign.safetensors", "-o", "b.safetensors"],
        ["merge", "foreign.safetensors", "-o", "b.safetensors", "--allow-unmatched", "-v"],
        ["inspect", "module.safetensors", "--blocks", "--spectrum", "--metadata", "-v"],
        ["inspect", "foreign.safetensors", "--metadata"],
        ["inspect", "model.safetensors"],
        ["compare", "module.safetensors", "foreign.safetensors", "-v"],
        ["compare", "module.safetensors", "module.safetensors", "-v"],
        ["cut-blocks", "module.safetensors", "--list"],
        ["cut-blocks", "module.safetensors", "--drop", "OTHER", "-o", "c.safetensors"],
        ["verify", "module.safetensors"],
        ["metadata", "show", "module.safetensors"],
        ["metadata", "hash", "module.safetensors"],
        ["extract", "model.safetensors", "model.safetensors", "-o", "d.safetensors"],
        ["resize", "module.safetensors", "--rank", "1", "-o", "e.safetensors", "-v"],
        ["convert", "module.safetensors", "--to", "peft", "-o", "f"],
    ):
        check_plain(run(*command))


@pytest.mark.parametrize("name", EVIL)
def test_a_page_and_a_picture_hold_no_markup_of_the_file(tmp_path: Path, name: str) -> None:
    evil = f"{EVIL[name]}</td><script>alert(1)</script>&lt;"
    file, page, picture = (tmp_path / f"x.{end}" for end in ("safetensors", "html", "svg"))
    save_file(lora(), file, {"ss_output_name": evil, evil: evil})
    check_plain(run("inspect", file, "--html", page, "--svg", picture))
    for written in (page, picture):
        text = written.read_text(encoding="utf-8")
        assert "<script" not in text and "\x1b" not in text and "\0" not in text


CONFIGS = {
    "an alpha that is no number": {"lora_alpha": "x"},
    "an alpha that is none of numbers": {"lora_alpha": float("nan")},
    "an alpha without bound": {"lora_alpha": 10**400},
    "a list of patterns": {"alpha_pattern": [1]},
    "a pattern that is no expression": {"alpha_pattern": {"(": 1}},
    "a pattern that takes years": {"alpha_pattern": {"(.*)*x": 1}},
    "a pattern without a number": {"alpha_pattern": {"to_q": "x"}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["folder", "header"])
def test_a_configuration_of_nonsense_is_refused(tmp_path: Path, name: str, where: str) -> None:
    config = {"lora_alpha": 1, **CONFIGS[name]}
    if where == "folder":
        place = peft(tmp_path, {"peft_type": "LORA", "r": 2, **config})
        named = "adapter_config.json"
    else:
        place = tmp_path / (named := "header.safetensors")
        flat = {f"unet.{key}": value for key, value in config.items()}
        factors = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
        tensors = {f"{DIFFUSERS}.{role}": factor for role, factor in factors.items()}
        save_file(tensors, place, {"lora_adapter_metadata": json.dumps(flat)})
    begun = time.monotonic()
    words = refused("merge", place, "-o", tmp_path / "out.safetensors")
    assert named in words and time.monotonic() - begun < 5


def peft(
    folder: Path, config: dict[str, object] | str, tensors: dict[str, Tensor] | None = None
) -> Path:
    place = folder / "peft"
    place.mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (place / "adapter_config.json").write_text(text)
    key = "base_model.model.unet.mid.to_q"
    plain = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors or plain, place / "adapter_model.safetensors")
    return place


TURNS: dict[str, tuple[dict[str, object], int, str]] = {
    "terms without end": ({"num_cayley_neumann_terms": 10**9}, 6, "neumann_terms"),
    "terms that are no number": ({"num_cayley_neumann_terms": "x"}, 6, "neumann_terms"),
    "half a term": ({"num_cayley_neumann_terms": 2.5}, 6, "neumann_terms"),
    "a bound that is no number": ({"coft": True, "eps": "x"}, 6, "eps"),
    "a bound that is none of numbers": ({"coft": True, "eps": float("nan")}, 6, "eps"),
    "numbers of no matrix": ({}, 5, "oft_R"),
    "no numbers": ({}, 0, "oft_R"),
}


@pytest.mark.parametrize("name", TURNS)
def test_rotations_that_cannot_be_made_are_refused(tmp_path: Path, name: str) -> None:
    """PEFT's OFT stores numbers, of which the configuration says how they become rotations."""
    config, numbers, word = TURNS[name]
    tensors = {"base_model.model.unet.mid.to_q.oft_R.weight": torch.full((2, numbers), 0.01)}
    place = peft(tmp_path, {"peft_type": "OFT", **config}, tensors)
    begun = time.monotonic()
    for command in (["inspect", place], ["convert", place, "--to", "kohya", "-o", tmp_path / "x"]):
        words = refused(*command)
        assert "peft" in words and word in words and ";" in words
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("rank", [0, -1, "x", 10**400, None])
def test_a_rank_that_divides_by_nothing_is_refused(tmp_path: Path, rank: object) -> None:
    """PEFT divides by it where a LoKr has no factors."""
    key = "base_model.model.unet.mid.to_q"
    whole = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(4, 4)}
    place = peft(tmp_path, {"peft_type": "LOKR", "r": rank, "alpha": 1}, whole)
    assert "as rank" in refused("merge", place, "-o", tmp_path / "out.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "\0", '{"r":' + "1" * 5000])
def test_json_that_is_none_or_too_deep_is_refused(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out.safetensors"
    assert "adapter_config.json" in refused("merge", peft(tmp_path, text), "-o", out)
    file = tmp_path / "x.safetensors"
    save_file(lora(), file, {"lora_adapter_metadata": text})
    assert "lora_adapter_metadata" in refused("merge", file, "-o", out)
    deep = dict.fromkeys(("ss_tag_frequency", "ss_datasets", "lorakit.recipe", "ss_x"), text)
    save_file(lora(), file, {**deep, "ss_network_args": text})
    check_plain(run("inspect", file, "--metadata"))
    check_plain(run("verify", file))
    assert run("merge", file, "-o", out).exit_code == 0


NAMES = ["../../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:\\x", "a\0b", "\ud800",
         "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    file = tmp_path / "made.safetensors"
    record = {"lora": name, "sha256": "", "header": "", "strength": "1"}
    recipe = {"lorakit": "1", "command": "merge", "inputs": [record], "options": {}}
    save_file(lora(), file, {"lorakit.recipe": json.dumps(recipe)})
    words = refused("merge", "--recipe", file, "-o", tmp_path / "out")
    # On POSIX C:\\x is a plain name, and there is no such file.
    assert "can follow" in words or (name == "C:\\x" and "found no" in words)
    result = run("verify", file, "--lora-dir", tmp_path)
    check_plain(result)
    assert "not done" in result.stdout


def test_a_strength_of_a_recipe_names_no_file(folder: Path, tmp_path: Path) -> None:
    """The sides of an extraction are put together as text, where a + names one more file."""
    secret = tmp_path / "elsewhere" / "secret.safetensors"
    secret.parent.mkdir()
    save_file(tensors_of(folder / "b.safetensors"), secret)
    made = Path("made.safetensors")
    ran("extract", "a.safetensors", "b.safetensors", "-o", made)
    recipe = json.loads(metadata_of(made)["lorakit.recipe"])
    for strength in (f"1+{secret}:0.5", f"lbw=1+{secret}", f"lbw=ALL+{secret}:1"):
        recipe["inputs"][0]["loras"][0]["strength"] = strength
        save_file(tensors_of(made), made, {"lorakit.recipe": json.dumps(recipe)})
        words = refused("merge", "--recipe", made, "-o", "again.safetensors")
        assert "can follow" in words and not Path("again.safetensors").exists()
        result = run("verify", made)
        check_plain(result)


def test_a_recipe_of_a_thousand_inputs_hashes_each_file_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.cli import _find

    asked = []
    hashed = _find._hash
    monkeypatch.setattr(_find, "_hash", lambda kind, file: asked.append(file) or hashed(kind, file))
    records = [{"lora": "a.safetensors", "sha256": str(number), "header": "", "strength": "1"}
               for number in range(1000)]  # fmt: skip
    recipe = {"lorakit": "1", "command": "merge", "inputs": records, "options": {}}
    save_file(lora(), "made.safetensors", {"lorakit.recipe": json.dumps(recipe)})
    begun = time.monotonic()
    check_plain(run("verify", "made.safetensors", "--lora-dir", "."))
    assert len(asked) == 1 and time.monotonic() - begun < 20


@pytest.mark.parametrize("option", ["only", "exclude"])
def test_a_pattern_of_a_recipe_that_takes_years_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """It comes with the names that it takes them for."""
    monkeypatch.chdir(tmp_path)
    key = f"lora_unet_{'a' * 60}b"
    for place, strength in (("a.safetensors", 1), ("b.safetensors", 2)):
        tensors = lora(key)
        tensors[f"{key}.lora_up.weight"] *= strength
        save_file(tensors, place)
    made = Path("made.safetensors")
    ran("extract", "a.safetensors", "b.safetensors", "-o", made, "--exclude", "x.*y.*z.*w.*")
    assert run("verify", made).exit_code == 0, "one that a person may write is followed"
    recipe = json.loads(metadata_of(made)["lorakit.recipe"])
    for pattern in ("(a+)+$", "(?:a|aa)*$", r"(a*)(a*)\1$", "a*a*a*a*$"):
        recipe["options"] = {"svd": "auto", option: [pattern]}
        save_file(tensors_of(made), made, {"lorakit.recipe": json.dumps(recipe)})
        begun = time.monotonic()
        check_plain(run("verify", made))
        words = refused("merge", "--recipe", made, "-o", "again.safetensors")
        assert "can take very long" in words and time.monotonic() - begun < 5
    long = lora(f"lora_unet_{'a' * 400}")
    save_file(long, "a.safetensors")
    words = refused("extract", "a.safetensors", "b.safetensors", "--only", "a.*b", "-o", "x.st")
    assert "at most 300 letters" in words


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_a_layer_of_terabytes_is_refused_before_it_is_made(tmp_path: Path, kind: str) -> None:
    """Two vectors of 2 MB stand for a ΔW of 10^12 weights."""
    tall, wide = torch.ones(1_000_000, 1).half(), torch.ones(1, 1_000_000).half()
    square = torch.ones(1000, 1000).half()
    tensors = {
        "LoRA": {"lora_up.weight": tall, "lora_down.weight": wide},
        "LoHa": {"hada_w1_a": tall, "hada_w1_b": wide, "hada_w2_a": tall, "hada_w2_b": wide},
        "LoKr": {"lokr_w1": square, "lokr_w2": square},
    }[kind]
    file = tmp_path / "large.safetensors"
    save_file({f"{LAYER}.{role}": tensor.clone() for role, tensor in tensors.items()}, file)
    words = refused("merge", file, "-o", tmp_path / "out.safetensors")
    assert "large.safetensors" in words and "fill your memory" in words


@pytest.mark.parametrize("name", ["/elsewhere/x", "", "a/b", "../x", "lora_unet_x"])
def test_a_name_in_a_file_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """PEFT has a folder a component, which was called what the tensors were."""
    monkeypatch.chdir(tmp_path)
    root = f"{tmp_path}/elsewhere/x" if name.startswith("/") else name
    file, out = tmp_path / "x.safetensors", tmp_path / "deep" / "out"
    save_file(lora(f"{root}.layer") | lora("b.c"), file)
    words = refused("convert", file, "--to", "peft", "-o", out)
    assert "x.safetensors" in words and "safetensors file" in words
    assert [entry.name for entry in tmp_path.rglob("*")] == ["x.safetensors"]


def test_names_that_lead_out_of_a_folder_are_not_written(tmp_path: Path) -> None:
    """Whatever asks for it."""
    source = DictSource({"x": torch.ones(1)})
    for name in ("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "", "."):
        with pytest.raises(OutputError, match="outside"):
            write_folder(tmp_path / "out", {name: source})
    assert not list(tmp_path.iterdir())


def test_a_shard_index_leads_nowhere_else(tmp_path: Path) -> None:
    """What no name of a file is, is refused like one that leads out of the folder."""
    (tmp_path / "m").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..\\outside",
                 "C:outside", "a\0b", "\ud800", "x" * 300, "", "."):  # fmt: skip
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "m" in refused("inspect", index)
        assert "m" in refused("inspect", tmp_path / "m")


def test_a_real_terminal_is_not_steered(tmp_path: Path) -> None:
    """The whole way, through a process of its own."""
    save_file(lora() | {EVIL["escape"]: torch.ones(2)}, tmp_path / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "merge", "x.safetensors", "-o", "out.safetensors"],
        capture_output=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "FORCE_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and b"\x1b" not in done.stderr and b"e?[2J" in done.stderr
