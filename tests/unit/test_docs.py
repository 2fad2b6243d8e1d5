"""The docs: every command and line of Python runs, every output is real, every link leads on."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import demo
import outputs
import pytest
import synthetic

from lorakit.names.families import ARCHITECTURES
from lorakit.names.presets import NAMES
from tests.helpers import few, run, slim

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The commands of recipes run in test_recipes.py; those in Japanese are the same as in English.
ELSEWHERE = {page for pages in outputs.recipes().values() for page in pages}
JAPANESE = [page for page in PAGES if page.is_relative_to(ROOT / "docs" / "ja")]
WITH_CODE = [
    page
    for page in PAGES
    if page not in ELSEWHERE
    and page not in JAPANESE
    and re.search(r"```(console|python)\n", page.read_text("utf-8"))
]


def named(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files that the pages name, smaller than the demo's, and go there."""
    layout = synthetic.single_file("sd1", factor=32)
    synthetic.write_checkpoint(tmp_path / "base.safetensors", layout)
    synthetic.write_tuned(tmp_path / "tuned.safetensors", layout)
    slim(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    for seed, name in enumerate(("style", "character", "before", "after")):
        tensors = synthetic.lora_tensors("sd1", rank=4 + seed, seed=seed, factor=32)
        synthetic.write_lora(tmp_path / f"{name}.safetensors", few(tensors, every=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_every_command_and_every_line_of_python_runs(page: Path, folder: Path) -> None:
    commands = [command for command, _ in outputs.shown(read(page))]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "lorakit", command
        result = run(*arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", read(page), re.S)
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert commands or blocks


def test_outputs_and_picture_are_what_the_commands_print_on_the_files_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo.make_models(tmp_path)
    printed = outputs.printed_by([read(page) for page in outputs.DEMO])
    for page in outputs.DEMO:
        wrong = outputs.differences(read(page), printed)
        assert not wrong, "\n".join([named(page), *wrong, "run python docs/outputs.py"])
    assert outputs.same_picture(read(outputs.PICTURE), outputs.drawn())


def test_an_output_that_is_not_real_is_found() -> None:
    real = {"lorakit a": ["norm  0.5071", "hash  0123456789abcdef", "", "written a.safetensors"]}

    def wrong(*lines: str) -> list[str]:
        page = "\n".join(["```console", "$ lorakit a", *lines, "```"])
        return outputs.differences(page, real)

    assert not wrong("norm 0.5072", "hash ffffffffffff", "", "written a.safetensors")
    assert not wrong("…", "written a.safetensors") and not wrong("norm 0.507", "…") and not wrong()
    assert wrong("norm 0.6", "…"), "another number"
    assert wrong("name 0.5071", "…"), "another word"
    assert wrong("norm 0.5071", "written a.safetensors"), "lines left out in silence"
    assert wrong("written a.safetensors", "norm 0.5071", "…"), "another order"
    assert outputs.differences("```console\n$ lorakit b\n```", real), "never run"
    stale = "```console\n$ lorakit a\nnorm 0.6\n…\n$ lorakit a\nold words\n```\n"
    fresh = outputs.refreshed(stale, real)
    assert fresh.startswith("```console\n$ lorakit a\nnorm  0.5071\n…\n$ lorakit a\nnorm  0.5071\n")
    assert not outputs.differences(fresh, real)


def test_the_pages_in_japanese_show_the_commands_and_outputs_of_those_in_english() -> None:
    for page in [page for page in JAPANESE if page.stem != "index"]:
        english = ROOT / "docs" / page.relative_to(ROOT / "docs" / "ja")
        assert outputs.shown(read(page)) == outputs.shown(read(english)), named(page)
    index, readme = (outputs.shown(read(page)) for page in (outputs.DEMO[2], outputs.README))
    assert index and all(found in readme for found in index)


def test_readme_and_tutorial_can_be_followed_in_one_folder() -> None:
    commands = [shlex.split(c) for page in outputs.DEMO[:2] for c, _ in outputs.shown(read(page))]
    written = [words[words.index("-o") + 1] for words in commands if "-o" in words]
    assert len(written) > 30 and len(written) == len(set(written)), "one would replace another"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_and_every_file_that_is_named_exists(page: Path) -> None:
    text = read(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        file, _, anchor = target.partition("#")
        if "://" not in target:
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(read(linked)), target
    for target in re.findall(r"`((?:tests|examples|docs|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / target).exists(), target


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


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
