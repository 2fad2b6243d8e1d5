"""Write docs/cli.md from the commands' own help, or check that it is up to date.

python docs/generate.py          writes
python docs/generate.py --check  fails if the page differs
"""

import sys
from pathlib import Path

import click

from lorakit.cli import lorakit

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# The command line

This page is generated from `lorakit --help` by `docs/generate.py`; CI fails if it is out of date.

Exit status: 0 done, 1 refused or failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
Nothing but results goes to stdout. An interrupted or failed command leaves no output file.
"""


def page() -> str:
    """Return the page: the group's help, then each command's."""
    parts = [HEAD, _section("lorakit", lorakit)]
    parts += [_section(f"lorakit {name}", lorakit.commands[name]) for name in lorakit.commands]
    return "\n".join(parts)


def _section(title: str, command: click.Command) -> str:
    context = click.Context(command, info_name=title, max_content_width=100, terminal_width=100)
    return f"## {title}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


def main() -> None:
    """Write the page, or compare it."""
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/cli.md is out of date; run python docs/generate.py")


if __name__ == "__main__":
    main()
