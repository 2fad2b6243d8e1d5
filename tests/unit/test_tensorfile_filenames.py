"""Names of outputs as Windows understands them, told apart on any system."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from lorakit.errors import OutputError
from lorakit.tensorfile import replacing
from lorakit.tensorfile.filenames import no_file_on_windows
from lorakit.tensorfile.leftovers import sibling
from tests.helpers import ran, refused

FILES = (
    "out.safetensors",
    "C:\\loras\\a+b (1).safetensors",
    "C:out.safetensors",
    "\\\\server\\share\\style & co.safetensors",
    "\\\\?\\C:\\very\\long.safetensors",
    "..\\here\\.hidden\\コピー機.safetensors",
    "console.safetensors",
    "null.safetensors",
    "com10.safetensors",
    "a.b.c.safetensors",
)
NONE = {
    "nul.safetensors": "device",
    "C:\\loras\\CON": "device",
    "aux.tar.safetensors": "device",
    "Com1 .safetensors": "device",
    "lpt9\\out.safetensors": "device",
    "style:0.5.safetensors": "':'",
    "C:\\a:b.safetensors": "':'",
    "what?.safetensors": "'?'",
    "a|b.safetensors": "'|'",
    "tab\t.safetensors": "'\\t'",
    "out.safetensors.": "lost",
    "folder \\out.safetensors": "lost",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_file(name: str) -> None:
    assert no_file_on_windows(PureWindowsPath(name)) is None


@pytest.mark.parametrize("name", NONE)
def test_what_is_none_is_told(name: str) -> None:
    why = no_file_on_windows(PureWindowsPath(name))
    assert why is not None and NONE[name] in why


def test_it_is_asked_on_windows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "nul.safetensors"
    assert replacing.check_file(place, overwrite=False, inputs=()) == place
    monkeypatch.setattr(replacing.os, "name", "nt")
    monkeypatch.setattr(replacing, "Path", type(tmp_path))
    with pytest.raises(OutputError, match="device"):
        replacing.check_file(place, overwrite=False, inputs=())


def test_the_temporary_name_is_short_and_hidden() -> None:
    """Windows allows 260 letters of a path where nothing is set, so it may not be much longer."""
    for name in ("x.safetensors", "n" * 243 + ".safetensors", "文" * 80):
        made = sibling(PurePosixPath("/folder") / name)  # type: ignore[arg-type]
        assert len(made.name) <= 30 and made.name.startswith(".") and made.parent.name == "folder"
        assert len(os.fsencode(made.name)) <= 62


@pytest.mark.parametrize(
    ("one", "two"), [("Style", "style"), ("é", unicodedata.normalize("NFD", "é")), ("a", "a")]
)
def test_outputs_that_are_one_where_case_does_not_count(
    sd15_lora: Path, tmp_path: Path, one: str, two: str
) -> None:
    files = [tmp_path / folder / f"{name}.safetensors" for folder, name in (("1", one), ("2", two))]
    for file in files:
        file.parent.mkdir()
        file.hardlink_to(sd15_lora)
    words = refused("resize", *files, "--rank", 1, "-o", tmp_path / "out", status=2)
    assert "Two inputs are called" in words and not (tmp_path / "out").exists()


class Insensitive(type(Path())):  # type: ignore[misc]
    """A path on a file system where case does not count: there is one file of both names."""

    def exists(self, **more: bool) -> bool:
        return any(e.name.lower() == self.name.lower() for e in Path(self.parent).iterdir())

    def samefile(self, other: object) -> bool:
        return str(self).lower() == str(other).lower()


def test_an_input_in_another_case_is_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "style.safetensors").write_bytes(b"x")
    monkeypatch.setattr(replacing, "Path", Insensitive)
    out, given = Insensitive(tmp_path / "STYLE.safetensors"), tmp_path / "style.safetensors"
    with pytest.raises(OutputError, match="inputs are never replaced"):
        replacing.check_file(out, overwrite=True, inputs=[given])


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
def test_an_input_in_a_folder_of_another_spelling_is_in_it(
    sd15_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, where no function tells that two spellings are one folder; here a link does."""
    given = tmp_path / "style" / "new"
    given.mkdir(parents=True)
    (tmp_path / "STYLE").symlink_to("style")
    mine = given / "a.safetensors"
    mine.write_bytes(sd15_lora.read_bytes())
    monkeypatch.setattr(replacing.os.path, "realpath", str)
    out = tmp_path / "STYLE" / "new"
    with pytest.raises(OutputError, match="holds the input"):
        replacing.check_folder(out, overwrite=True, inputs=[mine], names=["a.safetensors"])
    with pytest.raises(OutputError, match="lies inside the input"):
        replacing.check_folder(out / "x", overwrite=True, inputs=[given], names=[])
    with pytest.raises(OutputError, match="in the input"):
        replacing.check_file(out / mine.name, overwrite=True, inputs=[given])
    other = tmp_path / "style-2"
    assert replacing.check_folder(other, overwrite=True, inputs=[mine], names=[]) == other


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_is_repeated_is_not_written_over_by_its_other_name(
    sd15_lora: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    made, other = tmp_path / "made.safetensors", tmp_path / "MADE.safetensors"
    ran("merge", sd15_lora, "-o", made)
    link(made, other)
    for out in (made, other):
        words = refused("merge", "--recipe", made, "-o", out, "--overwrite")
        assert "is what is repeated" in words
