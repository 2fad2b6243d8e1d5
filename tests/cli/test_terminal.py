"""What the commands print in a terminal: narrow, without colours, in an old code page."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from lorakit.cli._letters import ERRORS, never_fail_on_a_letter
from lorakit.cli._render import say, show_table
from tests.helpers import ran, run

NAME = "[/b] 猫 a:car:b ‖.safetensors"
"""Markup, another script, an emoji's code, a letter that cp1252 lacks."""


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def narrow(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stdout a terminal of 40 letters, and return it."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    return stream


def a_table(columns: int, last: str = "") -> Table:
    table = Table(box=None, pad_edge=False)
    for place in range(columns):
        table.add_column(f"c{place}", justify="right")
    table.add_row(*("0.031" for _ in range(columns - 1)), last or "0.031")
    return table


def test_no_number_is_cut_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = narrow(monkeypatch)
    for columns in (5, 7, 9):
        show_table(a_table(columns))
    fits, close, wide = terminal.getvalue().splitlines()[1::2]
    assert fits == "  ".join(["0.031"] * 5) and close == " ".join(["0.031"] * 7)
    assert wide == " ".join(["0.031"] * 9), "the terminal goes on in the next line"


def test_a_long_name_is_whole_and_moves_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = narrow(monkeypatch)
    name = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0"
    show_table(a_table(3, name))
    assert terminal.getvalue().splitlines()[1] == f"0.031 0.031 {name}"


def test_lines_have_no_spaces_at_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = narrow(monkeypatch)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("a", "a long text that goes over the end of the line and is whole")
    table.add_row("b", "short")
    show_table(table, folded=True)
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 3 and all(line == line.rstrip() and len(line) <= 40 for line in lines)


def test_sentences_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = narrow(monkeypatch)
    say("They have little to do with each other: --method linear keeps each as it is.")
    lines = terminal.getvalue().splitlines()
    assert lines == [
        "They have little to do with each other:",
        "--method linear keeps each as it is.",
    ]


def test_into_a_pipe_a_sentence_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("word " * 60)
    assert capsys.readouterr().out.count("\n") == 1


def test_names_are_text_and_no_markup(slim_lora: Path, tmp_path: Path) -> None:
    """rich would fail on [/b] and draw a car."""
    out = tmp_path / NAME.replace("/", "")
    shown = run("resize", slim_lora, "--rank", 2, "-o", out).output
    assert shown.splitlines()[-1].startswith(f"written             {out}")
    for command in (["inspect", out], ["cut-blocks", "--list", out], ["verify", out]):
        assert run(*command).exit_code in (0, 1)
    assert str(out) in run("inspect", out).output


def commands(lora: Path, base: Path, tuned: Path, out: Path) -> dict[str, list[object]]:
    name = out / NAME.replace("/", "")
    return {
        "inspect": ["inspect", lora, "--against", base, "--spectrum", "-v"],
        "compare": ["compare", lora, lora, "-v"],
        "models": ["compare", base, tuned],
        "merge": ["merge", lora, lora, "--analyze", "-v", "-o", name],
        "into": ["merge", lora, "--into", base, "-v", "-o", name],
        "extract": ["extract", base, tuned, "--rank", 2, "-v", "-o", name],
        "resize": ["resize", lora, "--rank", 2, "-v", "-o", name],
        "cut-blocks": ["cut-blocks", lora, "--keep", "MID", "-v", "-o", name],
        "convert": ["convert", lora, "--to", "diffusers", "-v", "-o", name],
        "metadata": ["metadata", "set", lora, "é=猫‖", "-o", name],
        "show": ["metadata", "show", lora],
        "hash": ["metadata", "hash", lora],
        "list": ["cut-blocks", "--list", lora],
        "methods": ["methods"],
        "presets": ["presets"],
        "help": ["resize", "--help"],
        "refused": ["inspect", out / "猫‖.safetensors"],
    }


@pytest.fixture(scope="module")
def wordy(slim_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LoRA whose name and metadata are in letters that old code pages lack."""
    path = tmp_path_factory.mktemp("wordy") / NAME.replace("/", "")
    ran("metadata", "set", slim_lora, "ss_training_comment=猫 ‖ ü", "-o", path)
    return path


@pytest.mark.parametrize("name", commands(Path(), Path(), Path(), Path()))
def test_no_command_fails_on_a_letter(
    name: str, wordy: Path, sd15: Path, slim_tuned: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As Windows has it: stdout and stderr in cp1252, strict."""
    import lorakit.cli as cli

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    arguments = [str(a) for a in commands(wordy, sd15, slim_tuned, tmp_path)[name]]
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as done:
        cli.main()
    for stream in streams:
        stream.flush()
    said = [stream.buffer.getvalue().decode("cp1252") for stream in streams]  # type: ignore[attr-defined]
    assert done.value.code == (1 if name == "refused" else 0), said
    assert said[0] or name == "refused"


def test_what_a_code_page_lacks_is_written_in_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    never_fail_on_a_letter(stream)
    stream.write("‖ΔW‖² 1 − 2 … 猫 ü")
    stream.flush()
    assert stream.buffer.getvalue().decode("cp1252") == "|dW|² 1 - 2 … ? ü"  # type: ignore[attr-defined]
    assert "σ".encode("ascii", ERRORS) == b"s"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", ERRORS)


@pytest.mark.parametrize("more", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_none_are_wanted(slim_lora: Path, more: dict[str, str]) -> None:
    if os.name != "posix":
        pytest.skip("needs a pseudo-terminal")
    code = (
        "import os, pty, sys\n"
        "status = pty.spawn([sys.executable, '-m', 'lorakit', 'inspect', sys.argv[1], '--blocks'])"
        "\nsys.exit(os.waitstatus_to_exitcode(status))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    done = subprocess.run(
        [sys.executable, "-c", code, str(slim_lora)],
        capture_output=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert b"share of the change" in done.stdout
    assert b"38;5" not in done.stdout and b"48;" not in done.stdout
    assert (b"\x1b[" in done.stdout) == (more.get("TERM") != "dumb"), "bold is no colour"
