"""How fast a command starts: by what it imports, since seconds depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from lorakit.cli import MENU, load_command, lorakit
from lorakit.methods.menu import MENU as METHODS
from tests.helpers import run

IMPORTED = """
import json, sys
before = set(sys.modules)
from lorakit.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit:
        pass
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""
PLAIN = {"click", "lorakit"}
WITH_RICH = PLAIN | {"rich"}
GONE = "there-is-no.safetensors"


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a LoRA with all of SDXL's names: 722 layers of the UNet, 264 of the text encoders."""
    path = tmp_path_factory.mktemp("start") / "sdxl.safetensors"
    tensors = synthetic.lora_tensors("sdxl", rank=1, factor=32)
    return synthetic.write_lora(path, tensors, synthetic.lora_metadata("sdxl", rank=1))


def imported(*commands: list[str]) -> tuple[set[str], set[str]]:
    """Run commands in a process of their own; return its packages, and its modules of lorakit."""
    command = [sys.executable, "-c", IMPORTED, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    modules = json.loads(done.stderr.splitlines()[-1])
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    return packages, {name for name in modules if name.startswith("lorakit.")}


def test_what_calls_no_command_imports_none() -> None:
    packages, modules = imported(["--help"], ["--version"], ["bogus"], [])
    assert packages == PLAIN
    assert modules == {
        f"lorakit.{name}" for name in ("cli", "cli._guard", "cli._letters", "errors", "version")
    }


def test_what_torch_is_made_of_is_not_searched_for_garbage_again_and_again() -> None:
    """By a command; who imports lorakit keeps what is set."""
    told = (
        "import gc; own = gc.get_threshold(); import lorakit, lorakit.cli as c\n"
        "c.main = lambda: print(gc.get_threshold()[0])\n"
        "print(gc.get_threshold() == own); c.run()"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    kept, threshold = done.stdout.split()
    assert kept == "True" and int(threshold) >= 50_000


def test_a_list_needs_no_package_but_click() -> None:
    assert imported(["presets"], ["methods"], ["methods", "ties"])[0] == PLAIN


def test_no_help_needs_torch() -> None:
    assert imported(*([name, "--help"] for name in MENU))[0] == WITH_RICH


@pytest.mark.parametrize(
    "command",
    [
        *(["merge"], ["merge", GONE, "-o", "x"], ["resize", GONE, "-o", "x", "--rank", "4"]),
        *(["extract", GONE, "x", "-o", "y"], ["compare", GONE, "x"], ["convert", GONE, "-o", "x"]),
        *(["inspect"], ["inspect", GONE], ["verify", GONE], ["cut-blocks", "--list", GONE]),
        *(["resize", "x", "-o", "y", "--energy", "2"], ["cut-blocks", "x", "--rank"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_needs_no_torch(command: list[str]) -> None:
    assert imported(command)[0] <= WITH_RICH


def test_a_header_answers_without_torch(header: Path) -> None:
    path = str(header)
    looks = [["inspect", path], ["inspect", "--json", path]]
    assert imported(*looks, ["metadata", "show", path], ["metadata", "hash", path])[0] == WITH_RICH


def test_what_reads_tensors_does_import_torch(header: Path) -> None:
    assert imported(["inspect", "--blocks", str(header)])[0] >= {"torch", "numpy"}


def test_a_header_is_opened_twice_however_many_alphas_it_has(
    header: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the header, once for all alphas: a file that is scanned at each opening is slow."""
    from lorakit.tensorfile import header as module

    opened = []
    plain = module.open_regular
    monkeypatch.setattr(module, "open_regular", lambda path: (opened.append(path), plain(path))[1])
    found = json.loads(run("inspect", header, "--json").stdout)
    assert found["alphas"] == {"1": 986} and found["layers"] == 986
    assert len(opened) == 2


def test_the_menu_names_every_command_and_loads_it() -> None:
    assert list(MENU) == list(lorakit.commands)
    lines = run("--help").output.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(MENU)
    for line, text in zip(lines, MENU.values(), strict=True):
        assert line.endswith(text), "cut off"
    for name in MENU:
        assert load_command(name).name == name
    assert len(METHODS) == 17


def test_a_command_that_is_mistyped_is_guessed() -> None:
    assert "merge" in run("merg").output


LEFT = """
import atexit, sys
atexit.register(print, "taken apart")
{before}
from lorakit.cli import run
run()
"""


def left(*arguments: str, before: str = "") -> tuple[int, list[str]]:
    """Run a command in a process that would tell of its taking apart; return status and lines."""
    code = LEFT.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, encoding="utf-8"
    )
    return done.returncode, done.stdout.splitlines()


def test_a_process_is_left_once_all_is_said_and_not_taken_apart() -> None:
    """What torch needs for that is a fifth of a second of every command."""
    expected = run("methods").stdout.splitlines()
    assert left("methods") == (0, expected)
    assert left("inspect", GONE) == (1, [])
    assert left("inspect", "--bogus") == (2, [])


@pytest.mark.parametrize(
    "before", ["sys.setprofile(lambda *_: None)", "sys.settrace(lambda *_: None)"]
)
def test_who_watches_a_command_sees_its_end(before: str) -> None:
    status, lines = left("presets", before=before)
    assert status == 0 and "taken apart" in lines


def test_what_cannot_be_written_is_told_by_python() -> None:
    status, _ = left("--version", before="sys.stdout.close()")
    assert status != 0
