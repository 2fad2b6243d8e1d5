"""What a failure looks like: one sentence and an exit status."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from lorakit.cli._letters import printable
from lorakit.errors import LorakitError, SpecError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

P = ParamSpec("P")
R = TypeVar("R")


class Refused(click.ClickException):
    """A refusal or failure, already put in one sentence."""

    exit_code = FAILED


class WrongUsage(click.ClickException):
    """Arguments that cannot be read, already put in one sentence."""

    exit_code = USAGE


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one sentence; with -vv leave the traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            # Whoever reads, `head` say, has enough: click ends quietly.
            raise
        except (LorakitError, OSError, MemoryError, RuntimeError) as error:
            if _verbosity(kwargs) > 1:
                raise
            kind = WrongUsage if isinstance(error, SpecError) else Refused
            raise kind(_sentence(error)) from error

    return run


def _verbosity(kwargs: object) -> int:
    found = kwargs.get("verbose", 0) if isinstance(kwargs, dict) else 0
    return int(found)


def _sentence(error: BaseException) -> str:
    return printable(_told(error))


def _told(error: BaseException) -> str:
    if isinstance(error, LorakitError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename or 'the file system'}: {error.strerror or error}."
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "Out of memory; give a smaller --memory or fewer --threads, or use --device cpu."
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
