"""What a shell does with arguments: cmd.exe expands no pattern, and PowerShell none for us."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lorakit.cli as cli
from lorakit.cli._shell import at_home
from tests.helpers import metadata_of, ran, refused

WINDOWS = SimpleNamespace(**{**vars(os), "name": "nt"})


@pytest.fixture
def folder(sd15_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a1", "a[1]", "b", ".hidden"):
        shutil.copy(sd15_lora, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pattern_stands_for_the_files_that_it_fits(folder: Path) -> None:
    names = ["a1.safetensors", "a[1].safetensors", "b.safetensors"]
    for pattern in ("*.safetensors", f"{folder}/*.safetensors"):
        found = ran("inspect", pattern)
        assert [Path(one["path"]).name for one in found] == names  # type: ignore[call-overload]
    ran("resize", "a?.safetensors", "b*", "--rank", 1, "-o", "small")
    assert sorted(file.name for file in Path("small").iterdir()) == [names[0], names[2]]
    ran("merge", "*1*.safetensors", "-o", "merged.safetensors")
    assert ran("compare", "a*") == ran("compare", *names[:2])


def test_what_fits_nothing_is_said_as_it_was_typed(folder: Path) -> None:
    assert "c*.safetensors" in refused("inspect", "c*.safetensors")
    assert "*" in refused("merge", "<lora:*:1>", "-o", "x.safetensors", status=2)


def test_brackets_are_letters_of_a_name(folder: Path) -> None:
    """glob takes a[1] for a1."""
    assert ran("inspect", "a[1].safetensors")["path"] == "a[1].safetensors"
    assert ran("inspect", "*[1].safetensors")["path"] == "a[1].safetensors"


@pytest.mark.skipif(os.name != "posix", reason="no such name on Windows")
def test_a_file_of_that_very_name_is_taken_whole(folder: Path) -> None:
    shutil.copy("b.safetensors", "*.safetensors")
    assert ran("inspect", "*.safetensors")["path"] == "*.safetensors"


def test_options_and_names_are_as_they_were_typed_on_windows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """click would take files for regular expressions, and a1 for a[1]."""
    monkeypatch.setattr("click.core.os", WINDOWS)
    monkeypatch.setenv("NOTE", "expanded")
    arguments = ["metadata", "set", "a[1].safetensors", "b*=$NOTE", "b=b*", "-o", "x.safetensors"]
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0, capsys.readouterr()
    found = metadata_of(Path("x.safetensors"))
    assert (found["b*"], found["b"]) == ("$NOTE", "b*")


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    typed = ["~/a.safetensors", "~b", "a~/b", "-o", "~"]
    assert at_home(typed) == [str(tmp_path / "a.safetensors"), *typed[1:]]
