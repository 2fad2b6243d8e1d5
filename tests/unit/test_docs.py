"""The docs: every command and every line of Python in them runs, every link leads somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from lorakit.names.families import ARCHITECTURES
from lorakit.names.presets import NAMES
from tests.helpers import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [p for p in PAGES if re.search(r"```(console|python)\n", p.read_text("utf-8"))]


def named(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files that the tutorial names, small, and go there."""
    layout = synthetic.single_file("sd1", factor=32)
    synthetic.write_checkpoint(tmp_path / "base.safetensors", layout)
    synthetic.write_tuned(tmp_path / "tuned.safetensors", layout)
    for seed, name in enumerate(("style", "character", "before", "after")):
        tensors = synthetic.lora_tensors("sd1", rank=4 + seed, seed=seed, factor=32)
        synthetic.write_lora(tmp_path / f"{name}.safetensors", tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_every_command_and_every_line_of_python_runs(page: Path, folder: Path) -> None:
    commands = [
        line.removeprefix("$ ")
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "lorakit", command
        result = run(*arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert commands or names


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_and_every_test_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / target).exists(), target


def test_the_page_of_the_command_line_is_what_help_says() -> None:
    check = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_presets_shows_what_each_architecture_makes_of_them() -> None:
    result = run("presets")
    assert result.exit_code == 0
    for architecture in ARCHITECTURES:
        assert architecture.title in result.output
    assert all(f"  {name} " in result.output for name in NAMES)
