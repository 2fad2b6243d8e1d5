"""lorakit methods."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import click

from lorakit.cli._completion import complete_names
from lorakit.cli._guard import guarded
from lorakit.errors import SpecError
from lorakit.methods.menu import FAMILIES, MENU, OF_ALL, Entry


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_names(tuple(MENU)))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("-v", "--verbose", count=True, help="-vv shows tracebacks.")
@guarded
def methods(*, names: tuple[str, ...], as_json: bool, verbose: int) -> None:
    """List the merge methods: what each is for, and when it is a bad idea.

    With a NAME its parameters too, with what they mean and their defaults.
    """
    del verbose
    unknown = [name for name in names if name not in MENU]
    if unknown:
        raise SpecError(f"Method '{unknown[0]}' is unknown; there are {', '.join(MENU)}.")
    chosen = {name: MENU[name] for name in names or MENU}
    if as_json:
        body = {name: asdict(entry) for name, entry in chosen.items()}
        click.echo(json.dumps({"schema": 1, "command": "methods", "methods": body}))
        return
    for family, title in FAMILIES.items():
        members = {name: entry for name, entry in chosen.items() if entry.family == family}
        if members:
            click.echo(f"{title}\n")
            _show(members, whole=bool(names))
    click.echo(OF_ALL)


def _show(members: Mapping[str, Entry], *, whole: bool) -> None:
    for name, entry in members.items():
        click.echo(f"  {name}")
        click.echo(f"    {entry.purpose}")
        click.echo(f"    But: {entry.caution}")
        options = " ".join(f"--{key} {_text(value)}" for key, value in entry.defaults.items())
        if not whole:
            click.echo(f"    {options + '   ' if options else ''}{entry.paper}\n")
            continue
        for key, value in entry.defaults.items():
            _line(f"--{key} {_text(value)}", entry.meaning(key))
        if entry.spaces:
            _line("--space", entry.meaning("space"))
        _line("--flavor", ", ".join(entry.flavors))
        for flavor, defaults in entry.flavor_defaults.items():
            given = " ".join(f"--{key} {_text(value)}" for key, value in defaults.items())
            _line("", f"{flavor}: {given}")
        click.echo(f"    {entry.paper}\n")


def _line(option: str, meaning: str) -> None:
    click.echo(f"    {option:16} {meaning}")


def _text(value: float | str | bool) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
