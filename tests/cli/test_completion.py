"""What TAB offers, as each shell asks for it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from lorakit.cli import MENU, lorakit
from lorakit.cli.resize import SCORES
from lorakit.methods.menu import MENU as METHODS
from lorakit.names.presets import NAMES
from lorakit.operations.scores import OF_LORA, OF_MODEL

PAGE = Path(__file__).parents[2] / "docs" / "completion.md"
SHELLS = ("bash", "zsh", "fish", "powershell")


def offered(*words: str) -> list[str]:
    """Return what is offered for the last word; what the shell completes itself is "file …"."""
    complete = ShellComplete(lorakit, {}, "lorakit", "_LORAKIT_COMPLETE")
    items = complete.get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else f"{item.type} {item.value}" for item in items]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script(shell: str) -> None:
    if get_completion_class(shell) is None:
        pytest.skip("this click has no script for it")
    done = subprocess.run(
        [sys.executable, "-m", "lorakit"],
        env={**os.environ, "_LORAKIT_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{shell}_source" in PAGE.read_text(encoding="utf-8")
    assert "_LORAKIT_COMPLETE" in done.stdout and f"{shell}_complete" in done.stdout


def test_a_command_is_completed() -> None:
    assert offered("mer") == ["merge"]
    assert offered("") == list(MENU)
    assert offered("metadata", "") == ["hash", "remove", "set", "show"]


@pytest.mark.parametrize(
    "words",
    [
        *(["merge", ""], ["merge", "a.safetensors:0.8", "ch"], ["merge", "--into", "ba"]),
        *(
            ["merge", "a", "--against", "ba"],
            ["merge", "--recipe", "ol"],
            ["merge", "a", "-o", "x"],
        ),
        *(["extract", "be"], ["extract", "before.safetensors", "af"], ["resize", "a", "b"]),
        *(["resize", "--against", "ba"], ["cut-blocks", "st"], ["cut-blocks", "--list", "st"]),
        *(["convert", "st"], ["inspect", "st"], ["compare", "a", "b"], ["verify", "x"]),
        *(["metadata", "show", "st"], ["cut-blocks", "a", "--presets-file", "lb"]),
    ],
    ids=" ".join,
)
def test_where_a_file_is_meant_the_shell_completes_its_path(words: list[str]) -> None:
    assert offered(*words) == [f"file {words[-1]}"]


def test_a_folder_is_completed_as_one() -> None:
    assert offered("merge", "--lora-dir", "mo") == ["dir mo"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["merge", "a", "--method", "dare"], ["dare-linear", "dare-ties"]),
        (["merge", "a", "--flavor", ""], ["lorakit", "paper", "mergekit", "peft"]),
        (["cut-blocks", "a", "--preset", "OUT"], ["OUTD", "OUTS", "OUTALL"]),
        (["convert", "a", "--to", ""], ["kohya", "peft", "diffusers", "comfyui"]),
        (["extract", "a", "b", "--as", "d"], ["dora"]),
        (["merge", "a", "--dtype", "fp8"], ["fp8_e4m3fn", "fp8_e5m2"]),
        (["resize", "a", "--score", "fro"], ["fro-ckpt", "fro-lora"]),
        (["compare", "a", "b", "--device", "c"], ["cpu", "cuda"]),
        (["verify", "a", "--device", "m"], ["mps"]),
        (["methods", "ti"], ["ties"]),
        (["merge", "a", "--analy"], ["--analyze"]),
    ],
    ids=lambda value: value[-1] or value[-2] if isinstance(value, list) else None,
)
def test_values_are_completed(words: list[str], expected: list[str]) -> None:
    assert offered(*words) == expected


def test_what_is_offered_is_what_is_taken() -> None:
    assert offered("merge", "a", "--method", "") == list(METHODS)
    assert offered("methods", "") == list(METHODS)
    assert offered("cut-blocks", "a", "--preset", "") == list(NAMES)
    assert set(SCORES) == {*OF_MODEL, *OF_LORA}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("base.safetensors", "style one.safetensors", "stool.txt", "a+b.safetensors"):
        Path(name).touch()
    for name in ("stack", "models"):
        Path(name).mkdir()
    Path("models/style.safetensors").touch()
    yield tmp_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("base.safetensors+st", ["stack/", "style one.safetensors"]),
        ("base.safetensors+models/", ["models/style.safetensors"]),
        ("base.safetensors+a.safetensors:0.5+models/st", ["models/style.safetensors"]),
        ("base.safetensors+nothing", []),
        ("base.safetensors+nothing/here", []),
    ],
)
def test_a_lora_on_a_model_is_completed(files: Path, typed: str, expected: list[str]) -> None:
    before = typed.rpartition("+")[0]
    assert offered("extract", typed) == [f"{before}+{path}" for path in expected]
    assert offered("merge", "a", "--into", typed) == [f"{before}+{path}" for path in expected]


def test_a_plus_in_a_name_is_part_of_it(files: Path) -> None:
    assert offered("extract", "a+") == ["file a+"]


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [("lorakit mer", "merge"), ("lorakit cut-blocks a --preset MI", "MIDD")],
)
def test_bash_does_as_the_page_says(files: Path, line: str, expected: str) -> None:
    words = line.split()
    program = Path(sys.executable).parent / "lorakit"
    if not program.exists():
        pytest.skip("lorakit is not installed beside this Python")
    script = (
        f'eval "$(_LORAKIT_COMPLETE=bash_source lorakit)"; COMP_WORDS=({line}); '
        f"COMP_CWORD={len(words) - 1}; _lorakit_completion lorakit; echo ${{COMPREPLY[@]}}"
    )
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [expected], done.stderr
