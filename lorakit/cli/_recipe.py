"""What made a file: its recipe, read from the header alone and checked."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.cli._inputs import open_stored
from lorakit.cli._options import DTYPES
from lorakit.errors import FileFormatError, SpecError
from lorakit.peftpatterns import can_take_years
from lorakit.tensorfile.metadata import RECIPE_KEY
from lorakit.tensorfile.reading import parse_json
from lorakit.version import VERSION

LORA, MODEL = "LoRA", "model"
COMMANDS = ("merge", "extract", "resize", "cut-blocks", "convert")
_SHORT = 10
_LONGEST_NAME = 255

_NUMBER = (int, float)
_TYPES: Mapping[type | tuple[type, ...], tuple[str, ...]] = {
    str: (
        *("method", "space", "votes", "scope", "flavor", "match_norm", "calibrate"),
        *("as", "svd", "to", "dtype", "preset", "weights", "keep", "drop", "elements", "score"),
        "score",
    ),
    int: ("rank", "conv_rank", "size", "seed"),
    _NUMBER: (
        *("energy", "error", "sv_ratio", "sv_sum", "density", "epsilon", "gamma", "lambda_"),
        *("alpha", "min_change", "threshold", "rescale"),
    ),
    bool: ("normalize", "repair", "allow_unmatched"),
    list: ("only", "exclude"),
    dict: ("metadata",),
}
OPTIONS = {name: kind for kind, names in _TYPES.items() for name in names}
"""What a recipe may hold beside models, and of which type."""
_CHOICES = {
    "as": ("lora", "locon", "dora", "full"),
    "svd": ("auto", "exact", "fast"),
    "to": ("kohya", "peft", "diffusers", "comfyui"),
    "dtype": tuple(DTYPES.values()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An input as a recipe names it: LORA or MODEL, and hashes of its tensors and of the rest."""

    kind: str
    name: str
    sha256: str
    header: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {short(self.sha256)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """LoRAs with the text of their strengths, and the model that they are on."""

    model: Wanted | None
    loras: tuple[tuple[Wanted, str], ...]

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """All inputs."""
        loras = (lora for lora, _ in self.loras)
        return tuple(loras) if self.model is None else (self.model, *loras)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What made a file.

    Args:
        file: the file or folder.
        version: of the lorakit that made it.
        command: one of COMMANDS.
        sides: what stood as arguments: one stack of LoRAs, or the two sides of extract.
        into: the model that was baked into, with the LoRAs that were on it.
        against: the model that was named so.
        options: all others, by name.
        title: modelspec's title.
        body: all of it as it is stored.
    """

    file: Path
    version: str
    command: str
    sides: tuple[Side, ...]
    into: Side | None
    against: Wanted | None
    options: Mapping[str, Any]
    title: str | None
    body: Mapping[str, Any]

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """All inputs, each once."""
        sides = self.sides if self.into is None else (*self.sides, self.into)
        found = [wanted for side in sides for wanted in side.wanted]
        return tuple(dict.fromkeys(found if self.against is None else [*found, self.against]))


def short(digest: str) -> str:
    """Return the digits of a hash that people compare."""
    return digest[:_SHORT]


def read_recipe(file: Path) -> Recipe | None:
    """Read what made a file or folder, from its header; None where it does not say.

    Raises:
        FileFormatError: the recipe is damaged, or of a newer lorakit.
    """
    source = open_stored(file)
    parts = getattr(source, "parts", None)
    # One shard, or the index, stands for the folder that was written.
    file = file if file.is_dir() else getattr(source, "root", file)
    # Every file of a folder has the recipe.
    metadata = next(iter(parts.values())).metadata if parts else source.metadata
    if RECIPE_KEY not in metadata:
        return None
    with reading_recipe(file):
        return _recipe(file, parse_json(metadata[RECIPE_KEY]), metadata.get("modelspec.title"))


@contextmanager
def reading_recipe(file: Path) -> Iterator[None]:
    """Say in one sentence why a recipe cannot be followed.

    Raises:
        FileFormatError: instead of what reading a damaged one raises.
    """
    try:
        yield
    except (SpecError, ValueError, TypeError, LookupError, RecursionError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise FileFormatError(
            f"{file}: expected a recipe that lorakit {VERSION} can follow, found {why}; "
            "repeat it with the lorakit that wrote it."
        ) from None


def _recipe(file: Path, body: Any, title: str | None) -> Recipe:
    if not isinstance(body, dict):
        raise TypeError(f"{type(body).__name__} in place of an object")
    command, options = _text(body, "command"), dict(body["options"])
    if command not in COMMANDS:
        raise ValueError(f"the command '{command}'")
    inputs = list(body["inputs"])
    if command == "extract":
        sides = tuple(_side(side) for side in inputs)
    else:
        sides = (Side(model=None, loras=tuple(_lora(record) for record in inputs)),)
    into, against = options.pop("into", None), options.pop("against", None)
    _check(options)
    return Recipe(
        file=file,
        version=_text(body, "lorakit"),
        command=command,
        sides=sides,
        into=None if into is None else _side(into),
        against=None if against is None else _model(against),
        options=options,
        title=title,
        body=body,
    )


def _check(options: Mapping[str, Any]) -> None:
    """Check that every option is known and of its type: a newer lorakit may have others."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise TypeError(f"an option '{name}' that it does not know")
        fits = isinstance(value, OPTIONS[name]) and isinstance(value, bool) == (
            OPTIONS[name] is bool
        )
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        texts = not isinstance(value, list | dict) or all(isinstance(text, str) for text in parts)
        if not (fits and texts and value in _CHOICES.get(name, (value,))):
            raise TypeError(f"{name} = {value!r}")
    for pattern in (*options.get("only", ()), *options.get("exclude", ())):
        if can_take_years(pattern):
            raise ValueError(f"the pattern {pattern[:60]!r}, which can take very long")


def _side(record: Mapping[str, Any]) -> Side:
    loras = tuple(_lora(one) for one in record["loras"])
    return Side(model=_model(record) if "model" in record else None, loras=loras)


def _lora(record: Mapping[str, Any]) -> tuple[Wanted, str]:
    return _wanted(record, LORA, "lora", "sha256"), _text(record, "strength")


def _model(record: Mapping[str, Any]) -> Wanted:
    return _wanted(record, MODEL, "model", "sample")


def _wanted(record: Mapping[str, Any], kind: str, name: str, digest: str) -> Wanted:
    plain = _text(record, name)
    # A recipe from elsewhere must not lead out of the folders that are searched.
    elsewhere = plain != Path(plain.replace("\\", "/")).name or plain in ("", "..")
    if elsewhere or "\0" in plain or len(plain.encode()) > _LONGEST_NAME:
        raise ValueError(f"an input called {plain!r}")
    return Wanted(
        kind=kind, name=plain, sha256=_text(record, digest), header=_text(record, "header")
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} = {value!r}")
    return value
