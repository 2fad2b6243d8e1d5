"""lorakit metadata: what a file says of itself, shown, changed and checked; without torch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from lorakit.cli._guard import FAILED, guarded
from lorakit.cli._inspect_view import pairs
from lorakit.cli._letters import printable
from lorakit.cli._progress import watching
from lorakit.cli._render import bytes_text, show_table
from lorakit.cli._shell import Named
from lorakit.cli._words import in_words, shortened
from lorakit.errors import SpecError
from lorakit.operations.edit_metadata import (
    Edited,
    edit_metadata,
    metadata_hashes,
    read_metadata,
)
from lorakit.report import SCHEMA
from lorakit.tensorfile.hashes import MODEL_HASH
from lorakit.tensorfile.relabel import Hash

_FILE = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
_VERBOSE = click.option("-v", "--verbose", count=True, help="-vv shows tracebacks.")
_WRITING = (
    click.option(
        "-o",
        "--output",
        type=Named(path_type=Path),
        help="Write another file. An existing one needs --overwrite; FILE itself is refused.",
    ),
    click.option(
        "--in-place",
        is_flag=True,
        help="Replace FILE itself, at once when all is written; nothing else replaces an input.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    click.option(
        "--verify", is_flag=True, help="Read the output back and compare it before it is there."
    ),
    click.option("-q", "--quiet", is_flag=True, help="No table and no progress."),
    _JSON,
    _VERBOSE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where to write, and what to say of it."""

    output: Path | None
    in_place: bool
    overwrite: bool
    verify: bool
    quiet: bool
    as_json: bool

    @property
    def given(self) -> bool:
        """Whether there is anything to write."""
        return self.in_place or self.output is not None

    def check(self) -> None:
        """Check that one output is named.

        Raises:
            SpecError: none is named, or two are.
        """
        if self.in_place == (self.output is not None):
            raise SpecError("Name an output with -o, or replace the file itself with --in-place.")


def _writing(command: Callable[..., bool]) -> Callable[..., None]:
    """Add the options of a writing command; it gets them as `target`, and tells if all is well."""
    names = [field.name for field in fields(Target)]

    def well(*, verbose: int, **kwargs: Any) -> bool:
        del verbose
        chosen = {name: kwargs.pop(name) for name in names}
        return command(target=Target(**chosen), **kwargs)

    @wraps(command)
    def run(**kwargs: Any) -> None:
        if not guarded(well)(**kwargs):
            click.get_current_context().exit(FAILED)

    decorated: Callable[..., None] = run
    for option in reversed(_WRITING):
        decorated = option(decorated)
    return decorated


@click.group()
def metadata() -> None:
    """Show, change and check what a safetensors FILE says of itself.

    The tensors' bytes stay as they are: a changed file has another header before a copy of them.
    """


@metadata.command()
@_FILE
@_JSON
@_VERBOSE
@guarded
def show(*, file: Path, as_json: bool, verbose: int) -> None:
    """Show all keys, their values in plain words; --json gives them as they are stored."""
    del verbose
    told = read_metadata(file)
    if as_json:
        body = {"schema": SCHEMA, "command": "metadata show", "file": str(file)}
        _echo({**body, "metadata": dict(told)})
    elif not told:
        click.echo(f"{printable(str(file))} has no metadata.")
    else:
        told_in_words = {key: in_words(key, text) for key, text in sorted(told.items())}
        show_table(pairs(told_in_words), folded=True)


@metadata.command("set")
@_FILE
@click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...")
@_writing
def set_(*, file: Path, values: tuple[str, ...], target: Target) -> bool:
    """Set keys and keep all others; hashes that are there stay true."""
    return _edit(file, target, values=dict(map(_pair, values)))


@metadata.command()
@_FILE
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_writing
def remove(*, file: Path, keys: tuple[str, ...], target: Target) -> bool:
    """Remove keys; 'ss_*' in quotes takes all that begin so. Hashes that stay are true."""
    return _edit(file, target, remove=keys)


@metadata.command("hash")
@_FILE
@_writing
def hash_(*, file: Path, target: Target) -> bool:
    """Compute the hashes and compare the stored ones; with -o or --in-place write the true ones.

    sshs_model_hash is Civitai's AutoV3. The status is 1 if a stored hash is wrong and stays so.
    """
    if target.given:
        return _edit(file, target, hashes=True)
    found = metadata_hashes(file)
    if target.as_json:
        _echo(found.as_dict())
    elif not target.quiet:
        show_table(_hash_table(found.hashes), folded=True)
    return found.right


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SpecError(f"'{text}': expected KEY=VALUE.")
    return key, value


def _edit(
    file: Path,
    target: Target,
    *,
    values: dict[str, str] | None = None,
    remove: Sequence[str] = (),
    hashes: bool = False,
) -> bool:
    """Write the file with other metadata, and say what changed."""
    target.check()
    with watching(quiet=target.quiet or target.as_json) as progress:
        found = edit_metadata(
            file,
            values=values,
            remove=remove,
            hashes=hashes,
            output=target.output,
            overwrite=target.overwrite,
            verify=target.verify,
            progress=progress,
        )
    if target.as_json:
        _echo(found.as_dict())
    elif not target.quiet:
        show_table(pairs(_changes(found)), folded=True)
    return True


def _changes(found: Edited) -> dict[str, str]:
    rows = {
        key: f"{shortened(found.before.get(key, 'nothing'))} -> {shortened(text)}"
        for key, text in found.set.items()
    }
    rows |= dict.fromkeys(found.removed, "removed")
    verified = ", read back and the same" if found.verified else ""
    return {**rows, "written": f"{found.output} ({bytes_text(found.output_bytes)}){verified}"}


def _hash_table(found: Sequence[Hash]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("hash", "stored", "of these bytes"):
        table.add_column(title, overflow="fold")
    for one in found:
        name = f"{one.key} (AutoV3)" if one.key == MODEL_HASH else one.key
        wrong = f"wrong: {printable(one.stored or '')}"
        table.add_row(name, Text(wrong if one.right is False else one.verdict), one.found)
    return table


def _echo(body: dict[str, Any]) -> None:
    click.echo(json.dumps(body, sort_keys=True))
