"""The command line: one group, one file a command, errors as one sentence."""

import gc
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from types import TracebackType

import click

from lorakit.cli._guard import INTERRUPTED, Refused, WrongUsage
from lorakit.cli._letters import never_fail_on_a_letter, printable
from lorakit.version import VERSION

__all__ = ["MENU", "load_command", "lorakit", "main", "run"]

MENU: Mapping[str, str] = {
    "merge": "Merge LoRAs into one LoRA, or bake them into a checkpoint.",
    "extract": "Write the LoRA that turns one model or LoRA into another.",
    "resize": "Give LoRAs another rank: the best approximation there is.",
    "cut-blocks": "Delete the blocks that a LoRA does not need.",
    "convert": "Write a LoRA for kohya, PEFT, diffusers or ComfyUI.",
    "inspect": "Say what a file is, and show where a LoRA acts.",
    "compare": "Compare LoRAs or models: angles, overlap, conflicts.",
    "verify": "Check a file's hashes and values, and repeat its recipe.",
    "metadata": "Show, change and check a file's metadata.",
    "methods": "List the merge methods.",
    "presets": "List the block presets.",
}
"""The commands in the order of the help, each with its line there."""
_NEW_OBJECTS = 50_000
"""After so many Python looks for garbage in cycles; what is large here is in none."""


class Menu(click.Group):
    """A group that knows its commands by their lines, and imports the one that is called.

    Importing all of them takes longer than a header's answer.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the menu."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command that is called."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, None if found is None else load_command(str(found.name)), rest


def load_command(name: str) -> click.Command:
    """Import a command of the menu."""
    word = name.replace("-", "_")
    command = getattr(import_module(f"lorakit.cli.{word}"), word)
    if not isinstance(command, click.Command):
        raise TypeError(f"lorakit.cli.{word} holds no command of that name")
    return command


@click.group(
    cls=Menu,
    commands=[click.Command(name, help=line) for name, line in MENU.items()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="lorakit")
def lorakit() -> None:
    """Merge, extract, resize and cut LoRAs: exact, streaming, fast."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        never_fail_on_a_letter(stream)
    sys.excepthook = _say_once
    try:
        sys.exit(_status())
    except (Refused, WrongUsage) as refused:
        click.echo(f"lorakit: {refused.message}", err=True)
        sys.exit(refused.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("lorakit: interrupted; no output was left half-written.", err=True)
        sys.exit(INTERRUPTED)


def run() -> None:
    """Run the command line, and leave the process as soon as all is said.

    To take torch apart module by module costs a fifth of a second, and nobody is there to see it.
    To look for garbage among what it is made of, at every 700 new objects, costs a quarter.
    """
    gc.set_threshold(_NEW_OBJECTS)
    try:
        main()
    except SystemExit as end:
        watched = sys.gettrace() or sys.getprofile()
        if watched or not isinstance(end.code, int) or not _all_said():
            raise
        os._exit(end.code)


def _all_said() -> bool:
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError, AttributeError):
        # Closed, or there is none: Python itself knows how to end then.
        return False
    return True


def _status() -> int:
    typed = sys.argv[1:]
    if sys.platform == "win32":
        from lorakit.cli._shell import at_home

        typed = at_home(typed)
    # Given to it, click leaves them as they are; see _shell.
    return int(lorakit.main(typed, standalone_mode=False, prog_name="lorakit") or 0)


def _say_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "-vv" in sys.argv:
        sys.__excepthook__(kind, error, trace)
        return
    click.echo(
        f"lorakit: internal error, {kind.__name__}: {printable(str(error))}; "
        "run it again with -vv and report what it prints.",
        err=True,
    )
