"""How an operation says how far it is, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total); `total` is fixed for one `what`."""


def silent(what: str, done: int, total: int) -> None:
    """Listen to nothing."""
