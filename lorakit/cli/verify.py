"""lorakit verify."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from lorakit.cli._guard import FAILED, guarded
from lorakit.cli._options import Common, device_option
from lorakit.cli._pages import keep_pages
from lorakit.cli._progress import watching
from lorakit.cli._render import cells, say, show_table
from lorakit.cli._shell import Named
from lorakit.errors import FileFormatError, LorakitError, OutputError
from lorakit.report import SCHEMA, name_some

if TYPE_CHECKING:
    from lorakit.cli._find import Input
    from lorakit.cli._recipe import Recipe
    from lorakit.tensorfile.relabel import Hash
    from lorakit.tensorfile.source import TensorSource

SAME, DIFFERS, SKIPPED, BROKEN = "same", "differs", "not done", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What repeating the recipe showed: a verdict, why, and the names of what differs."""

    verdict: str
    why: str = ""
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was found of a file.

    Args:
        file: as it was named.
        hashes: (name of the hash, below the name of its file in a folder; the claim or None).
        tensors: how many there are.
        odd: those that hold NaN or infinity.
        recipe: what made it, None where it does not say.
        inputs: of the recipe.
        replay: what repeating it showed.
        notes: why a replay may differ.
    """

    file: Path
    hashes: "tuple[tuple[str, Hash | None], ...]"
    tensors: int
    odd: tuple[str, ...]
    recipe: "Recipe | None"
    inputs: "tuple[Input, ...]"
    replay: Replay
    notes: tuple[str, ...]

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong; what could not be compared is not."""
        wrong = any(claim is not None and not claim.right for _, claim in self.hashes)
        return not (wrong or self.odd or self.replay.verdict in (DIFFERS, BROKEN))


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--lora-dir",
    "folders",
    multiple=True,
    type=Named(path_type=Path, file_okay=False),
    help="Where the inputs are besides; they are looked for beside FILE and here too.",
)
@click.option("--no-replay", is_flag=True, help="Check hashes and values alone.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No table and no progress.")
@click.option("-v", "--verbose", count=True, help="-vv shows tracebacks.")
@click.pass_context
def verify(
    context: click.Context,
    *,
    file: Path,
    folders: tuple[Path, ...],
    no_replay: bool,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Check what FILE says of itself: its hashes, its values, and the recipe that made it.

    Where the recipe's inputs are at hand it is repeated in the system's folder for temporary
    files, and the two are compared byte for byte. The status is 1 if anything is wrong.
    """
    keep_pages()
    common = _common(device=device, quiet=quiet or as_json, verbose=verbose)
    checked = guarded(_check)(
        file, folders=folders, replay=not no_replay, common=common, verbose=verbose
    )
    if as_json:
        click.echo(json.dumps(_as_dict(checked), sort_keys=True))
    elif not quiet:
        for note in checked.notes:
            say(f"note: {note}", err=True)
        show_table(_table(checked), folded=True)
    if not checked.fine:
        context.exit(FAILED)


def _common(*, device: str, quiet: bool, verbose: int) -> Common:
    return Common(
        output=Path(),
        overwrite=False,
        dtype=None,
        device=device,
        threads=None,
        memory=None,
        dry_run=False,
        verify=False,
        metadata={},
        no_metadata=False,
        allow_unmatched=False,
        json=False,
        quiet=quiet,
        verbose=verbose,
    )


def _check(
    file: Path, *, folders: Sequence[Path], replay: bool, common: Common, verbose: int
) -> Checked:
    from lorakit.cli._find import find_inputs
    from lorakit.cli._inputs import open_stored
    from lorakit.cli._recipe import read_recipe
    from lorakit.cli._replay import doubts
    from lorakit.compute import Compute
    from lorakit.tensorfile.claims import not_finite

    del verbose
    source = open_stored(file)
    hashes = tuple(_hashes(getattr(source, "parts", None) or {"": source}))
    with watching(quiet=common.quiet) as progress:
        odd = not_finite(source, compute=Compute.of(device="cpu"), progress=progress)
    recipe, why = None, "no recipe in the metadata"
    try:
        recipe = read_recipe(file)
    except FileFormatError as error:
        why = str(error)
    inputs = () if recipe is None else find_inputs(recipe, folders)
    repeated = Replay(verdict=SKIPPED, why="as told" if recipe is not None else why)
    if replay and recipe is not None:
        repeated = _replay(recipe, inputs, common)
    return Checked(
        file=file,
        hashes=hashes,
        tensors=len(source.specs),
        odd=odd,
        recipe=recipe,
        inputs=inputs,
        replay=repeated,
        notes=() if recipe is None else doubts(recipe, inputs),
    )


def _hashes(parts: "Mapping[str, TensorSource]") -> "Iterator[tuple[str, Hash | None]]":
    from lorakit.tensorfile.claims import check_claims
    from lorakit.tensorfile.hashes import HASHES

    for name, part in parts.items():
        found = {claim.key: claim for claim in check_claims(part)}
        for key in HASHES:
            yield f"{name}: {key}" if name else key, found.get(key)


def _replay(recipe: "Recipe", inputs: "Sequence[Input]", common: Common) -> Replay:
    from lorakit.cli._find import FOUND
    from lorakit.cli._replay import replayed
    from lorakit.tensorfile.differing import differences

    absent = [one.wanted.name for one in inputs if one.verdict != FOUND]
    if absent:
        return Replay(verdict=SKIPPED, why=f"without {name_some(absent)}; see --lora-dir")
    with TemporaryDirectory(prefix="lorakit-") as folder:
        output = Path(folder) / ("again" if recipe.file.is_dir() else "again.safetensors")
        try:
            replayed(recipe, inputs, replace(common, output=output))
        except OutputError as error:
            # No room for temporary files says nothing of the file.
            return Replay(verdict=SKIPPED, why=" ".join(str(error).split()))
        except LorakitError as error:
            return Replay(verdict=BROKEN, why=" ".join(str(error).split()))
        differs = differences(recipe.file, output)
    return Replay(verdict=DIFFERS if differs else SAME, differs=differs)


def _as_dict(checked: Checked) -> dict[str, Any]:
    recipe = checked.recipe
    return {
        "schema": SCHEMA,
        "command": "verify",
        "file": str(checked.file),
        "ok": checked.fine,
        "hashes": [
            {
                "key": name,
                "stored": claim and claim.stored,
                "found": claim and claim.found,
                "verdict": _verdict(claim),
            }
            for name, claim in checked.hashes
        ],
        "tensors": checked.tensors,
        "not_finite": list(checked.odd),
        "recipe": recipe and {"command": recipe.command, "lorakit": recipe.version},
        "inputs": [
            {
                "name": one.wanted.name,
                "kind": one.wanted.kind,
                "sha256": one.wanted.sha256,
                "verdict": one.verdict,
                "path": one.path and str(one.path),
                "same_header": one.same_header,
            }
            for one in checked.inputs
        ],
        "replay": {
            "verdict": checked.replay.verdict,
            "why": checked.replay.why,
            "differs": list(checked.replay.differs),
        },
        "notes": list(checked.notes),
    }


def _verdict(claim: "Hash | None") -> str:
    if claim is None:
        return "absent"
    return "right" if claim.right else "wrong"


def _table(checked: Checked) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column()
    for row in _rows(checked):
        table.add_row(*cells(*row))
    return table


def _rows(checked: Checked) -> Iterator[tuple[str, str, str]]:
    from lorakit.tensorfile.differing import count

    for name, claim in checked.hashes:
        wrong = claim is not None and not claim.right
        detail = (
            f"{claim.stored} is stored, the bytes have {claim.found}" if wrong and claim else ""
        )
        yield name, _verdict(claim), detail
    yield (
        "values",
        "not finite" if checked.odd else "finite",
        name_some(checked.odd) if checked.odd else f"{checked.tensors} tensors",
    )
    if checked.recipe is not None:
        yield "made by", checked.recipe.command, f"lorakit {checked.recipe.version}"
    for one in checked.inputs:
        yield one.wanted.name, one.verdict, "" if one.path is None else str(one.path)
    replay = checked.replay
    yield "repeated", replay.verdict, count(replay.differs) if replay.differs else replay.why
