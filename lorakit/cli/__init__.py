"""The command line: one group, one file a command, errors as one sentence."""

import sys
from types import TracebackType

import click

from lorakit.cli._guard import INTERRUPTED, Refused, WrongUsage
from lorakit.cli._words import printable
from lorakit.cli.compare import compare
from lorakit.cli.convert import convert
from lorakit.cli.cut_blocks import cut_blocks
from lorakit.cli.extract import extract
from lorakit.cli.inspect import inspect
from lorakit.cli.merge import merge
from lorakit.cli.metadata import metadata
from lorakit.cli.methods import methods
from lorakit.cli.presets import presets
from lorakit.cli.resize import resize
from lorakit.cli.verify import verify
from lorakit.version import VERSION

__all__ = ["lorakit", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="lorakit")
def lorakit() -> None:
    """Merge, extract, resize and cut LoRAs: exact, streaming, fast."""


COMMANDS = (
    *(merge, extract, resize, cut_blocks, convert),
    *(inspect, compare, verify, metadata, methods, presets),
)
for command in COMMANDS:
    lorakit.add_command(command)


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail_on_a_letter(stream)
    sys.excepthook = _say_once
    try:
        sys.exit(lorakit.main(standalone_mode=False, prog_name="lorakit") or 0)
    except (Refused, WrongUsage) as refused:
        click.echo(f"lorakit: {refused.message}", err=True)
        sys.exit(refused.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("lorakit: interrupted; no output was left half-written.", err=True)
        sys.exit(INTERRUPTED)


def _never_fail_on_a_letter(stream: object) -> None:
    """A console or file in a legacy code page shows '?' for a letter that it lacks."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _say_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "-vv" in sys.argv:
        sys.__excepthook__(kind, error, trace)
        return
    click.echo(
        f"lorakit: internal error, {kind.__name__}: {printable(str(error))}; "
        "run it again with -vv and report what it prints.",
        err=True,
    )
