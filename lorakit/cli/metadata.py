"""lorakit metadata: what a file says of itself, shown, changed and checked; without torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
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
from lorakit.cli._words import in_words, shortened
from lorakit.errors import SpecError
from lorakit.report import SCHEMA, name_some
from lorakit.tensorfile.relabel import (
    HASHES,
    MODEL_HASH,
    Hash,
    Stored,
    check_hashes,
    open_stored,
    rewritten,
    with_hashes,
)
from lorakit.tensorfile.replacing import check_file

_FILE = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
_VERBOSE = click.option("-v", "--verbose", count=True, help="-vv shows tracebacks.")
_WRITING = (
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
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

    def place(self, file: Path) -> Path:
        """Check that the output may be written, and return where.

        Raises:
            SpecError: none is named, or two are.
            OutputError: it exists, or is the file.
        """
        if self.in_place == (self.output is not None):
            raise SpecError("Name an output with -o, or replace the file itself with --in-place.")
        if self.output is None:
            return file.resolve()
        return check_file(self.output, overwrite=self.overwrite, inputs=[file])


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
    told = open_stored(file).header.metadata
    if as_json:
        _echo("show", file, {"metadata": dict(told)})
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
    changes = dict(map(_pair, values))
    stored = open_stored(file)
    return _write(stored, {**stored.header.metadata, **changes}, command="set", target=target)


@metadata.command()
@_FILE
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_writing
def remove(*, file: Path, keys: tuple[str, ...], target: Target) -> bool:
    """Remove keys; 'ss_*' in quotes takes all that begin so. Hashes that stay are true."""
    stored = open_stored(file)
    told = stored.header.metadata
    gone = {key for key in told if any(fnmatchcase(key, pattern) for pattern in keys)}
    missing = [p for p in keys if not any(fnmatchcase(key, p) for key in told)]
    if missing:
        there = name_some(sorted(told)) or "none"
        raise SpecError(f"{file}: expected a key '{missing[0]}' to remove, found {there}.")
    kept = {key: text for key, text in told.items() if key not in gone}
    return _write(stored, kept, command="remove", target=target)


@metadata.command("hash")
@_FILE
@_writing
def hash_(*, file: Path, target: Target) -> bool:
    """Compute the hashes and compare the stored ones; with -o or --in-place write the true ones.

    sshs_model_hash is Civitai's AutoV3. The status is 1 if a stored hash is wrong and stays so.
    """
    stored = open_stored(file)
    if target.given:
        told = with_hashes(stored, stored.header.metadata)
        return _write(stored, told, command="hash", target=target)
    found = check_hashes(stored)
    if target.as_json:
        _echo("hash", file, {"hashes": [_as_dict(one) for one in found]})
    elif not target.quiet:
        show_table(_hash_table(found), folded=True)
    return all(one.right is not False for one in found)


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SpecError(f"'{text}': expected KEY=VALUE.")
    if key in HASHES:
        raise SpecError(f"{key} is computed, not set; see lorakit metadata hash --in-place.")
    return key, value


def _write(file: Stored, told: Mapping[str, str], *, command: str, target: Target) -> bool:
    """Write the file with other metadata, and say what changed."""
    place = target.place(file.path)
    with watching(quiet=target.quiet or target.as_json) as progress:
        nbytes, new = rewritten(file, told, place=place, verify=target.verify, progress=progress)
    old, output = file.header.metadata, target.output or file.path
    changed = {key: new[key] for key in sorted(new) if old.get(key) != new[key]}
    removed = sorted(key for key in old if key not in new)
    if target.as_json:
        body = {"set": changed, "removed": removed, "verified": target.verify}
        _echo(command, file.path, {**body, "output": str(output), "output_bytes": nbytes})
    elif not target.quiet:
        verified = ", read back and the same" if target.verify else ""
        _show_written(old, changed, removed, f"{output} ({bytes_text(nbytes)}){verified}")
    return True


def _show_written(
    old: Mapping[str, str], changed: Mapping[str, str], removed: Sequence[str], written: str
) -> None:
    rows = {
        key: f"{shortened(old.get(key, 'nothing'))} -> {shortened(text)}"
        for key, text in changed.items()
    }
    rows |= dict.fromkeys(removed, "removed")
    show_table(pairs({**rows, "written": written}), folded=True)


def _verdict(found: Hash) -> str:
    return "absent" if found.right is None else "right" if found.right else "wrong"


def _as_dict(found: Hash) -> dict[str, str | None]:
    return {
        "key": found.key,
        "stored": found.stored,
        "found": found.found,
        "verdict": _verdict(found),
    }


def _hash_table(found: Sequence[Hash]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("hash", "stored", "of these bytes"):
        table.add_column(title, overflow="fold")
    for one in found:
        name = f"{one.key} (AutoV3)" if one.key == MODEL_HASH else one.key
        wrong = f"wrong: {printable(one.stored or '')}"
        table.add_row(name, Text(wrong if one.right is False else _verdict(one)), one.found)
    return table


def _echo(command: str, file: Path, body: Mapping[str, Any]) -> None:
    told = {"schema": SCHEMA, "command": f"metadata {command}", "file": str(file), **body}
    click.echo(json.dumps(told, sort_keys=True))
