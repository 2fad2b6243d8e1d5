"""Names of files in any script, with any sign that the command line means something by; links."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from lorakit.lorafile import load_lora
from tests.helpers import metadata_of, ran, refused, run

posix = pytest.mark.skipif(os.name != "posix", reason="names and links as POSIX has them")
NAMES = {
    "Japanese": "コピー機学習法",
    "emoji": "👩‍🎨🎨",
    "composed": unicodedata.normalize("NFC", "café ñ"),
    "combining": unicodedata.normalize("NFD", "café ñ"),
    "right to left": "نمط می‌خواهم",
    "Devanagari": "हिन्दी",
    "spaces": " two  words ",
    "quotes": 'it\'s "quoted"',
    "brackets": "[bold]x[red]",
    "pattern": "a*b?[c]",
    "colon": "style:0.5",
    "plus": "a+b",
    "both": "a:1+b:2",
    "angles": "<x>",
    "equals": "te=0.5",
    "dash": "-style",
    "two dashes": "--overwrite",
    "percent": "%s{0}$HOME",
    "long": "n" * 243,
    "long in bytes": "文" * 80,
    "dots": "...a..",
    "newline": "a\nb",
}


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.safetensors", "base.safetensors"):
        shutil.copy(made / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(*arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)


@posix
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(folder: Path, name: str) -> None:
    """As an input, at a strength, in an expression, as an output, in a folder, in a recipe."""
    lora, out = f"{NAMES[name]}.safetensors", f"{NAMES[name][:60]} out.safetensors"
    (folder / "a.safetensors").rename(folder / lora)
    exact = {m: a.scale for m, a in load_lora(folder / lora).adapters.items()}
    done("merge", "-o", out, "--", f"{lora}:0.5")
    assert load_lora(folder / out).adapters.keys() == exact.keys()
    made = json.loads(metadata_of(folder / out)["lorakit.recipe"])["inputs"][0]
    assert (made["lora"], made["strength"]) == (lora, "0.5")
    done("merge", f"--recipe={out}", "-o", "again.safetensors")
    assert bool((folder / "again.safetensors").read_bytes() == (folder / out).read_bytes())
    sides = (f"base.safetensors+{lora}:0.2", f"base.safetensors+{lora}:0.9:te=1")
    done("extract", "-o", "x.safetensors", "--rank", 1, "--", *sides)
    done("convert", "--to", "peft", "-o", f"{NAMES[name][:60]} folder", "--", lora)
    assert load_lora(folder / f"{NAMES[name][:60]} folder").adapters.keys() == exact.keys()
    for command in (["inspect"], ["verify", "--no-replay"], ["metadata", "show"]):
        assert run(*command, "--", lora).exit_code == 0
    assert not list(folder.glob(".*.tmp"))


@posix
def test_a_name_that_is_no_text(folder: Path) -> None:
    """Bytes that are not UTF-8, as old archives unpack to."""
    name = os.fsdecode(b"caf\xe9.safetensors")
    try:
        (folder / "a.safetensors").rename(folder / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert run("inspect", name).exit_code == 0
    result = run("merge", name, "-o", "out.safetensors")
    assert result.exit_code == 0 or "valid Unicode" in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert run("merge", name, "-o", "plain.safetensors", "--no-metadata").exit_code == 0
    page = run("inspect", name, "--html", "x.html", "--svg", "x.svg")
    assert page.exit_code == 0, page.output


@posix
class TestLinks:
    """The output is what a link leads to; a link to an input is that input."""

    def test_a_link_stays_and_what_it_leads_to_is_written(self, folder: Path) -> None:
        real = folder / "disk" / "real.safetensors"
        real.parent.mkdir()
        (folder / "out.safetensors").symlink_to("disk/real.safetensors")
        ran("merge", "a.safetensors", "-o", "out.safetensors")
        assert (folder / "out.safetensors").is_symlink() and load_lora(real).adapters
        refused("merge", "a.safetensors", "-o", "out.safetensors")
        ran("merge", "a.safetensors", "-o", "out.safetensors", "--overwrite")
        assert (folder / "out.safetensors").is_symlink()

    def test_a_link_to_an_input_is_refused(self, folder: Path) -> None:
        before = (folder / "a.safetensors").read_bytes()
        (folder / "out.safetensors").symlink_to("a.safetensors")
        (folder / "two.safetensors").symlink_to("out.safetensors")
        for out in ("out.safetensors", "two.safetensors"):
            words = refused("merge", "a.safetensors", "-o", out, "--overwrite")
            assert "the input" in words
        assert bool((folder / "a.safetensors").read_bytes() == before)

    def test_an_input_that_is_a_link_is_not_replaced_by_its_other_name(self, folder: Path) -> None:
        (folder / "link.safetensors").symlink_to("a.safetensors")
        words = refused("merge", "link.safetensors", "-o", "a.safetensors", "--overwrite")
        assert "the input" in words

    def test_links_in_a_circle_are_refused(self, folder: Path) -> None:
        (folder / "x.safetensors").symlink_to("y.safetensors")
        (folder / "y.safetensors").symlink_to("x.safetensors")
        for more in ([], ["--overwrite"]):
            words = refused("merge", "a.safetensors", "-o", "x.safetensors", *more)
            assert "circle" in words
        assert (folder / "x.safetensors").is_symlink()
        assert "x.safetensors" in refused("merge", "x.safetensors", "-o", "out.safetensors")

    def test_a_folder_that_is_a_link(self, folder: Path) -> None:
        (folder / "real").mkdir()
        (folder / "out").symlink_to("real")
        ran("convert", "a.safetensors", "--to", "peft", "-o", "out")
        assert (folder / "out").is_symlink() and load_lora(folder / "real").adapters
        ran("convert", "a.safetensors", "--to", "peft", "-o", "out", "--overwrite")
        assert (folder / "out").is_symlink()

    def test_a_folder_that_holds_an_input_is_refused(self, folder: Path) -> None:
        """Also where the input has just the name of what would be written."""
        (folder / "in").mkdir()
        mine = folder / "in" / "adapter_model.safetensors"
        shutil.copy("a.safetensors", mine)
        before = mine.read_bytes()
        words = refused("convert", mine, "--to", "peft", "-o", "in", "--overwrite")
        assert "input" in words and bool(mine.read_bytes() == before)
        (folder / "link").symlink_to("in")
        refused("convert", "link/adapter_model.safetensors", "--to", "peft", "-o", "in",
                "--overwrite")  # fmt: skip
        assert bool(mine.read_bytes() == before)
