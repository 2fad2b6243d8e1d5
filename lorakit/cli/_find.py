"""A recipe's inputs, found again by name and recognised by content."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorakit.cli._inputs import header_of, open_stored
from lorakit.cli._recipe import MODEL, Recipe, Wanted, short
from lorakit.errors import FileFormatError, LorakitError
from lorakit.names.tags import composed
from lorakit.report import name_some

FOUND, OTHER, MISSING = "found", "other content", "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What became of one input.

    Args:
        wanted: as the recipe names it.
        verdict: FOUND, OTHER or MISSING.
        path: where it is, or what was found of its name.
        sha256: of the tensors there.
        same_header: whether names, metadata and alphas are as they were.
    """

    wanted: Wanted
    verdict: str
    path: Path | None = None
    sha256: str = ""
    same_header: bool = True


def find_inputs(
    recipe: Recipe, folders: Sequence[Path], *, named: Mapping[Wanted, Path] | None = None
) -> tuple[Input, ...]:
    """Look for every input: beside the file, in the current folder, in and below `folders`.

    Args:
        recipe: whose inputs.
        folders: as the user named them.
        named: inputs that are there and nowhere else, whatever they are called.

    Raises:
        FileFormatError: a folder is none.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileFormatError(f"{folder}: expected a folder, found none; check --lora-dir.")
    told, below = named or {}, _below(folders)
    # A recipe from elsewhere may name a file a thousand times.
    hashed = cache(_hash)
    return tuple(
        _recognised(
            wanted,
            [told[wanted]] if wanted in told else _places(wanted, recipe, folders, below),
            hashed,
        )
        for wanted in recipe.wanted
    )


def check_found(recipe: Recipe, inputs: Sequence[Input], folders: Sequence[Path]) -> None:
    """Check that all inputs are there.

    Raises:
        FileFormatError: some are not, or are others.
    """
    missing = [str(one.wanted) for one in inputs if one.verdict == MISSING]
    if missing:
        searched = name_some(dict.fromkeys(str(place) for place in _searched(recipe, folders)))
        raise FileFormatError(
            f"{recipe.file}: expected the inputs of its recipe, found no {name_some(missing)} in "
            f"{searched}; name their folder with --lora-dir."
        )
    for one in inputs:
        if one.verdict == OTHER:
            raise FileFormatError(
                f"{one.path}: expected the {one.wanted.kind} of the recipe, "
                f"{short(one.wanted.sha256)}, found other content, "
                f"{short(one.sha256) or 'which cannot be read'}; get the file as it was, or name "
                "its folder with --lora-dir."
            )


def _searched(recipe: Recipe, folders: Sequence[Path]) -> tuple[Path, ...]:
    return (recipe.file.absolute().parent, Path.cwd(), *folders)


def _below(folders: Sequence[Path]) -> Mapping[str, Sequence[Path]]:
    """Return all that is in and below the folders, by name, accents joined to their letters."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for place in sorted(folder.rglob("*")):
            found.setdefault(composed(place.name), []).append(place)
    return found


def _places(
    wanted: Wanted, recipe: Recipe, folders: Sequence[Path], below: Mapping[str, Sequence[Path]]
) -> Iterator[Path]:
    seen: list[Path] = []
    beside = (folder / wanted.name for folder in _searched(recipe, folders))
    for place in (*beside, *below.get(composed(wanted.name), ())):
        real = place.resolve()
        # What is repeated is not its own input, even if it has the name of one.
        if place.exists() and real not in (*seen, recipe.file.resolve()):
            seen.append(real)
            yield place


def _recognised(
    wanted: Wanted, places: Iterator[Path] | Sequence[Path], hashed: Callable[[str, Path], str]
) -> Input:
    found: list[Input] = []
    for place in places:
        sha256 = hashed(wanted.kind, place)
        fits = sha256 == wanted.sha256
        same = not fits or header_of(place) == wanted.header
        one = Input(
            wanted=wanted,
            verdict=FOUND if fits else OTHER,
            path=place,
            sha256=sha256,
            same_header=same,
        )
        if fits and same:
            return one
        found.append(one)
    # The first that fits but for its header, or the first.
    found.sort(key=lambda one: one.verdict != FOUND)
    return found[0] if found else Input(wanted=wanted, verdict=MISSING)


def _hash(kind: str, place: Path) -> str:
    from lorakit.tensorfile.fingerprint import sample_hash
    from lorakit.tensorfile.metadata import model_hash

    try:
        source = open_stored(place)
        return sample_hash(source) if kind == MODEL else model_hash(source)
    except LorakitError:
        return ""
