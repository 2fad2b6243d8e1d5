"""Show in the docs what the commands really print.

python docs/outputs.py          writes every block that shows an output anew
python docs/outputs.py --check  fails where a page shows something else

A line `…` in a block stands for lines that the page leaves out. Numbers may differ by a few per
cent, as they do between platforms, and hashes by all; words may not. Pages of recipes show what
their scripts in examples/recipes print, other pages what their commands print on the demo's files.
"""

import importlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"
sys.path[:0] = [str(RECIPES.parent), str(RECIPES)]

README = ROOT / "README.md"
DOCS = ROOT / "docs"
DEMO = [README, DOCS / "tutorial.md", DOCS / "ja" / "index.md", DOCS / "ja" / "tutorial.md"]
"""Pages whose commands run on the files of examples/demo.py."""
PICTURE = DOCS / "images" / "inspect.svg"
"""What README's last commands draw."""
MORE = "…"
NEAR, NOTHING = 0.05, 1e-3
"""How far numbers may differ, relatively; below the second they are rounding, and may be others."""
BLOCK = re.compile(r"(?<=```console\n)(.*?)(?=```)", re.S)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
HASH = re.compile(r"\b[0-9a-f]{8,}\b")
Lines = Sequence[str]


def shown(page: str) -> list[tuple[str, Lines]]:
    """Return every command of a page's console blocks, and the lines below it."""
    return [found for block in BLOCK.findall(page) for found in commands(block)]


def commands(text: str) -> Iterator[tuple[str, Lines]]:
    """Split what a console shows into commands and the lines below them."""
    command, lines = "", list[str]()
    for line in [*text.splitlines(), "$ "]:
        if not line.startswith("$ "):
            lines.append(line.rstrip())
            continue
        if command:
            yield command, lines
        command, lines = line.removeprefix("$ "), []


def fitted(page: Lines, real: Lines) -> list[str] | None:
    """Return the page's lines as they really are, None where the words are others."""
    at, free, lines = 0, False, list[str]()
    for line in page:
        if line == MORE:
            free = True
        else:
            same = (i for i in range(at, len(real)) if _words(real[i]) == _words(line))
            place = next(same, None)
            if place is None or (place > at and not free):
                return None
            at, free, line = place + 1, False, real[place]
        lines.append(line)
    return lines if free or at == len(real) else None


def differences(page: str, printed: Mapping[str, Lines]) -> list[str]:
    """Return a sentence for every command that was not run, or prints something else."""
    wrong = []
    for command, lines in shown(page):
        if command not in printed:
            wrong.append(f"{command}: is not run")
        elif lines:
            real = fitted(lines, printed[command])
            if real is None or not all(map(_near, lines, real)):
                wrong.append("\n".join([f"{command}: prints", *printed[command]]))
    return wrong


def refreshed(page: str, printed: Mapping[str, Lines]) -> str:
    """Return a page that shows what is really printed, trimmed as before where it still fits."""

    def block(found: re.Match[str]) -> str:
        lines = []
        for command, old in commands(found[0]):
            real = printed.get(command, [])
            new = (fitted(old, real) or real) if old else []
            lines += [f"$ {command}", *new]
        return "".join(f"{line}\n" for line in lines)

    return BLOCK.sub(block, page)


def _words(line: str) -> str:
    return " ".join(NUMBER.sub("0", HASH.sub("#", line)).split())


def _near(line: str, real: str) -> bool:
    ours, theirs = (
        [float(number.replace(",", "")) for number in NUMBER.findall(HASH.sub("#", text))]
        for text in (line, real)
    )
    return all(
        abs(a - b) <= NEAR * max(abs(a), abs(b)) or max(abs(a), abs(b)) < NOTHING
        for a, b in zip(ours, theirs, strict=True)
    )


def recipes() -> dict[str, list[Path]]:
    """Return the scripts by name, and the pages that show them: one in each language."""
    names = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "kitchen")
    folders = [DOCS / "recipes", DOCS / "ja" / "recipes"]
    return {name: [f / f"{name.replace('_', '-')}.md" for f in folders] for name in names}


def cooked(name: str) -> tuple[dict[str, float], dict[str, Lines]]:
    """Run a recipe's script in the current folder; return what it measured and what it printed."""
    script, kitchen = importlib.import_module(name), importlib.import_module("kitchen")
    stream = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream):
        found = script.cook()
        kitchen.measured(found)
    text = stream.getvalue()
    printed = dict(commands(text))
    for command, lines in printed.items():
        printed[command] = [line for line in lines if not line.startswith("# ")]
    return found, {**printed, f"python examples/recipes/{name}.py": text.splitlines()}


def printed_by(pages: Sequence[str]) -> dict[str, Lines]:
    """Run all commands of these pages that show an output, each once, in the current folder."""
    kitchen = importlib.import_module("kitchen")
    found = [each for page in pages for each in shown(page)]
    stream = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream):
        for command in dict.fromkeys(command for command, lines in found if lines):
            kitchen.lorakit(command.removeprefix("lorakit "))
    silent: dict[str, Lines] = {command: () for command, _ in found}
    return silent | dict(commands(stream.getvalue()))


def drawn() -> str:
    """Run README's commands for the picture in the current folder, and return the picture."""
    kitchen = importlib.import_module("kitchen")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for command, _ in shown(README.read_text(encoding="utf-8")):
            if "style-out.safetensors" in command:
                kitchen.lorakit(command.removeprefix("lorakit "))
    return Path(PICTURE.name).read_text(encoding="utf-8")


def same_picture(one: str, other: str) -> bool:
    """Tell whether two pictures hold the same words, and numbers that are near."""
    ours, theirs = (re.findall(r">([^<>]+)</text>", picture) for picture in (one, other))
    real = fitted(ours, theirs)
    return real is not None and all(map(_near, ours, real))


def main() -> None:
    """Write the pages anew, or compare them."""
    torch, demo = importlib.import_module("torch"), importlib.import_module("demo")
    torch.set_num_threads(1)
    for name, pages in recipes().items():
        with fresh_folder():
            printed = cooked(name)[1]
        update(pages, printed)
    with fresh_folder() as folder:
        demo.make_models(folder)
        printed = printed_by([page.read_text(encoding="utf-8") for page in DEMO])
        picture = drawn()
    update(DEMO, printed)
    if not same_picture(PICTURE.read_text(encoding="utf-8"), picture):
        if "--check" in sys.argv:
            sys.exit(f"{PICTURE.relative_to(ROOT)} is out of date; run python docs/outputs.py")
        PICTURE.write_text(picture, encoding="utf-8", newline="\n")


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """Go into a temporary folder, and back again."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(home)


def update(pages: Sequence[Path], printed: Mapping[str, Lines]) -> None:
    """Write these pages anew; with --check leave at the first difference."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        wrong = differences(text, printed)
        if wrong and "--check" in sys.argv:
            sys.exit("\n".join([f"{page.relative_to(ROOT)}:", *wrong]))
        if wrong:
            page.write_text(refreshed(text, printed), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
