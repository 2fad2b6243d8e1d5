"""What a shell does with arguments, done here where it does not: on Windows, or in quotes.

click would do it on Windows to every argument: there `--only "unet.*"` becomes the name of a file
unet.safetensors that happens to lie in the folder, and `a[1].safetensors` that of a1.safetensors.
"""

import os
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

import click

from lorakit.cli._completion import Completer

Command = TypeVar("Command", bound=Callable[..., Any])


class Named(click.Path):
    """A path that is not empty: `-o "$OUT"` without an OUT would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a path."""
        if value == "":
            self.fail("expected a name, found an empty one.", param, ctx)
        return super().convert(value, param, ctx)


def at_home(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the user's folder in the place of a ~ at their beginning."""
    return [
        str(Path(text).expanduser()) if text.startswith(("~/", "~\\")) else text
        for text in arguments
    ]


def files_argument(
    name: str, metavar: str, *, complete: Completer, required: bool = True
) -> Callable[[Command], Command]:
    """Return an argument of any number of files, where a pattern stands for those that it fits."""
    return click.argument(
        name,
        nargs=-1,
        required=required,
        metavar=metavar,
        shell_complete=complete,
        callback=_each_file,
    )


def _each_file(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Put the files that a pattern with * or ? fits in its place, in the order of their names.

    What is the name of a file, or fits none, stays as it is.

    Raises:
        BadParameter: one is empty, which Path takes for the current folder.
    """
    if "" in values:
        raise click.BadParameter("expected a name, found an empty one.", ctx, param)
    return tuple(name for text in values for name in _files(text))


def _files(text: str) -> list[str]:
    if not ("*" in text or "?" in text) or os.path.lexists(text):
        return [text]
    # Brackets are common in names: style[1].safetensors is the second one that was downloaded.
    plain = text.replace("[", "[[]")
    return sorted(glob(plain)) or [text]  # noqa: PTH207, Path's takes hidden files too
