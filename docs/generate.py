"""Write the pages that follow from the code: cli.md, architectures.md and api.md.

python docs/generate.py          writes
python docs/generate.py --check  fails if a page differs
"""

import sys
from pathlib import Path

import click
from api import api_page

from lorakit.cli import load_command, lorakit
from lorakit.names.architectures import Architecture
from lorakit.names.families import ARCHITECTURES

FOLDER = Path(__file__).parent
HEAD = """# The command line

This page is generated from `lorakit --help` by `docs/generate.py`; CI fails if it is out of date.

Exit status: 0 done, 1 refused or failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
Nothing but results goes to stdout. An interrupted or failed command leaves no output file.
"""


ARCHITECTURES_HEAD = """# Architectures

This page is generated from the tables in `lorakit/names` by `docs/generate.py`; CI fails if it is
out of date.

Layers are what a LoRA can change in the denoiser and the text encoders; a fused layer is one in the
single file and several in a diffusers folder. Of every row all modules are found in every dialect,
baked alike into both layouts and extracted again; and the table behind it is compared with what
diffusers makes of such a file, or with the model's own list of keys.

| architecture | layers | fused in the file | kohya's paths | text encoders | blocks | test |
|---|---|---|---|---|---|---|"""
TABLES = {
    "test_names_peer": ("sd1", "sd2", "sdxl"),
    "test_names_layouts": ("sdxl-refiner",),
    "test_names_flux": ("flux", "chroma", "flux2-klein-4b", "flux2-klein-9b", "flux2"),
    "test_names_sd3": ("sd3", "sd3-large"),
    "test_names_dit": ("qwen-image", "z-image", "lumina2", "pixart", "auraflow", "anima"),
    "test_names_video": (
        *("wan-small", "wan", "hunyuan-video", "hunyuan-image"),
        *("ltx", "ltx-13b", "ltx2"),
    ),
}
"""Where an architecture's table is compared with another's, by the architecture's id."""


def command_page() -> str:
    """Return the page of the command line: the group's help, then each command's."""
    commands = (_sections(f"lorakit {name}", load_command(name)) for name in lorakit.commands)
    sections = [_section("lorakit", lorakit), *(one for found in commands for one in found)]
    return "\n".join([HEAD, *sections])


def _sections(title: str, command: click.Command) -> list[str]:
    """Return a command's section, and those of the commands below it."""
    below = command.commands if isinstance(command, click.Group) else {}
    inner = (_sections(f"{title} {name}", found) for name, found in below.items())
    return [_section(title, command), *(section for found in inner for section in found)]


def _section(title: str, command: click.Command) -> str:
    context = click.Context(command, info_name=title, max_content_width=100, terminal_width=100)
    return f"## {title}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


def architecture_page() -> str:
    """Return the page of the architectures: a row each."""
    return "\n".join([ARCHITECTURES_HEAD, *map(_row, ARCHITECTURES)]) + "\n"


def _row(architecture: Architecture) -> str:
    layers = sum(1 for name in architecture.modules.values() if not name.norm)
    fused = sum(map(architecture.original_fused, architecture.fused))
    names = "single file" if architecture.kohya_original else "diffusers"
    texts = ", ".join(
        f"`{architecture.kohya_prefix(component)}` {clip}"
        for component, clip in architecture.clips.items()
    )
    blocks, tests = _ids(architecture.blocks), _tests(architecture)
    cells = (architecture.title, layers, fused, names, texts or "none", blocks, tests)
    return f"| {' | '.join(map(str, cells))} |"


def _tests(architecture: Architecture) -> str:
    (table,) = (file for file, ids in TABLES.items() if architecture.id in ids)
    both = "[dialects, layouts](../tests/oracle/test_architectures.py)"
    return f"{both}, [table](../tests/unit/{table}.py)"


def _ids(blocks: tuple[str, ...]) -> str:
    """Write runs of ids as ranges: IN00-IN11."""
    runs: list[list[str]] = []
    for block in blocks:
        letters = block.rstrip("0123456789")
        if runs and letters != block and runs[-1][0].rstrip("0123456789") == letters:
            runs[-1].append(block)
        else:
            runs.append([block])
    return " ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


PAGES = {"cli.md": command_page, "architectures.md": architecture_page, "api.md": api_page}


def main() -> None:
    """Write the pages, or compare them."""
    for name, made in PAGES.items():
        text, page = made(), FOLDER / name
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8", newline="\n")
        elif not page.exists() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{name} is out of date; run python docs/generate.py")


if __name__ == "__main__":
    main()
