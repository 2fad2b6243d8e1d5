"""Repeating what made a file: from its recipe to the same calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli._find import FOUND, Input, check_found, find_inputs
from lorakit.cli._inputs import lora_sum
from lorakit.cli._options import Common
from lorakit.cli._recipe import Recipe, Side, Wanted, read_recipe, reading_recipe
from lorakit.cli.convert import make as make_converted
from lorakit.cli.cut_blocks import make as make_cut
from lorakit.cli.extract import make as make_extracted
from lorakit.cli.merge import make as make_merged
from lorakit.cli.resize import make as make_resized
from lorakit.errors import FileFormatError, OutputError, SpecError
from lorakit.methods.method import Method
from lorakit.names.specs import LoraSpec, ModelSpec, lora_spec
from lorakit.tensorfile.replacing import lies_in
from lorakit.version import VERSION

if TYPE_CHECKING:
    from lorakit.linalg.ranks import RankRule
    from lorakit.report import Report

Paths = Mapping[Wanted, str]
Again = Callable[[], "Report"]

_SUFFIX = ".safetensors"


def repeat(
    file: Path,
    folders: Sequence[Path],
    common: Common,
    *,
    into: str | None = None,
    against: str | None = None,
) -> "Report":
    """Repeat what made a file, and compare the two where that costs little.

    Args:
        file: the file or folder with the recipe.
        folders: where to look for the inputs besides.
        common: the output and how to compute; the rest is as the recipe says.
        into: the model that was baked into, where it is elsewhere or called otherwise.
        against: likewise.

    Raises:
        FileFormatError: the file has no recipe, or an input is missing or another one.
    """
    recipe = read_recipe(file)
    if recipe is None:
        raise FileFormatError(
            f"{file}: expected a file that lorakit wrote with its recipe, found none in its "
            "metadata; name the inputs themselves."
        )
    file = recipe.file
    check_output(file, common.output)
    inputs = find_inputs(recipe, folders, named=_named(recipe, into=into, against=against))
    check_found(recipe, inputs, folders)
    report = replayed(recipe, inputs, common)
    notes = doubts(recipe, inputs)
    if not common.dry_run and (recipe.into is None or common.verify):
        notes = (*notes, _compared(file, common.output))
    return replace(report, notes=(*notes, *report.notes))


def replayed(recipe: Recipe, inputs: Sequence[Input], common: Common) -> "Report":
    """Write to `common.output` what the recipe says; all inputs must be there.

    The output gets the recipe of the file that is repeated, and its title, so that neither the
    output's name nor that of a model changes a byte.
    """
    at = {one.wanted: str(one.path) for one in inputs if one.verdict == FOUND}
    with reading_recipe(recipe.file):
        again = _again(recipe, at, _as_told(recipe, inputs, common))
    return again()


def doubts(recipe: Recipe, inputs: Sequence[Input]) -> tuple[str, ...]:
    """Say why the bytes may differ although the inputs have the recorded tensors."""
    changed = [one.wanted.name for one in inputs if not one.same_header]
    notes = [
        f"{name} has the recorded tensors, but other names, metadata or alphas than when "
        f"{recipe.file.name} was made; the bytes may differ."
        for name in changed
    ]
    if recipe.version != VERSION:
        notes.append(
            f"{recipe.file.name} was made by lorakit {recipe.version}, this is {VERSION}; the "
            "bytes may differ."
        )
    return tuple(notes)


def check_output(file: Path, output: Path) -> None:
    """Check that an output can have the bytes of a file or folder, and is not that itself.

    Raises:
        OutputError: it is, lies in it, or has the other form.
    """
    place = output.resolve()
    if (place.exists() and place.samefile(file)) or (file.is_dir() and lies_in(place, file)):
        raise OutputError(f"{output} is what is repeated; choose another name.")
    folder = file.is_dir()
    if folder == (output.suffix.lower() == _SUFFIX):
        form, name = ("folder", "a folder's name") if folder else ("file", f"a {_SUFFIX} name")
        raise OutputError(f"{output}: expected {name}, as {file} is a {form}; choose such a name.")


def _compared(file: Path, output: Path) -> str:
    from lorakit.tensorfile.differing import count, differences

    odd = differences(file, output)
    if not odd:
        return f"{output.name} has the same bytes as {file.name}."
    return f"{output.name} differs from {file.name} {count(odd)}."


def _named(recipe: Recipe, *, into: str | None, against: str | None) -> dict[Wanted, Path]:
    model = None if recipe.into is None else recipe.into.model
    given = {"--into": (into, model), "--against": (against, recipe.against)}
    named = {}
    for option, (path, wanted) in given.items():
        if path is None:
            continue
        if wanted is None:
            raise SpecError(f"{recipe.file} was made without {option}; leave it out.")
        if not Path(path).exists():
            raise FileFormatError(f"{path}: expected a model, found nothing there; check {option}.")
        named[wanted] = Path(path)
    return named


def _as_told(recipe: Recipe, inputs: Sequence[Input], common: Common) -> Common:
    exact = recipe.version == VERSION and all(one.same_header for one in inputs)
    options = recipe.options
    return replace(
        common,
        dtype=options.get("dtype"),
        metadata=dict(options.get("metadata", {})),
        no_metadata=False,
        allow_unmatched=options.get("allow_unmatched", False),
        title=recipe.title,
        recipe=recipe.body if exact else None,
    )


def _again(recipe: Recipe, at: Paths, common: Common) -> Again:
    commands = {
        "merge": _merge,
        "extract": _extract,
        "resize": _resize,
        "cut-blocks": _cut,
        "convert": _convert,
    }
    return commands[recipe.command](recipe, at, common)


def _merge(recipe: Recipe, at: Paths, common: Common) -> Again:
    into = recipe.into
    model = None
    if into is not None and into.model is not None:
        model = ModelSpec(path=at[into.model], loras=_specs(into, at))
    chosen = {
        field.name: recipe.options[field.name]
        for field in fields(Method)
        if field.name in recipe.options
    }
    return partial(
        make_merged,
        _specs(recipe.sides[0], at),
        into=model,
        against=_against(recipe, at),
        method=Method(name=recipe.options["method"], **chosen),
        rule=_rule(recipe),
        presets={},
        common=common,
    )


def _extract(recipe: Recipe, at: Paths, common: Common) -> Again:
    original, tuned = (_expression(side, at) for side in recipe.sides)
    options = recipe.options
    return partial(
        make_extracted,
        original,
        tuned,
        kind=options.get("as"),
        only=tuple(options.get("only", ())),
        exclude=tuple(options.get("exclude", ())),
        min_change=options.get("min_change", 0.0),
        alpha=options.get("alpha"),
        svd=options["svd"],
        dialect=options.get("to"),
        presets={},
        rule=_rule(recipe),
        common=common,
    )


def _resize(recipe: Recipe, at: Paths, common: Common) -> Again:
    (spec,) = _specs(recipe.sides[0], at)
    against = _against(recipe, at)
    return partial(
        make_resized,
        spec,
        common.output,
        rule=_rule(recipe),
        against=against,
        score=recipe.options.get("score"),
        rescale=recipe.options.get("rescale", 1.0),
        common=common,
    )


def _cut(recipe: Recipe, at: Paths, common: Common) -> Again:
    (spec,) = _specs(recipe.sides[0], at)
    options = recipe.options
    return partial(
        make_cut,
        spec,
        given={name: options.get(name) for name in ("preset", "weights", "keep", "drop")},
        elements=options.get("elements"),
        against=_against(recipe, at),
        presets={},
        common=common,
    )


def _convert(recipe: Recipe, at: Paths, common: Common) -> Again:
    (spec,) = _specs(recipe.sides[0], at)
    options = recipe.options
    return partial(
        make_converted,
        spec,
        dialect=options.get("to"),
        kind=options.get("as"),
        against=_against(recipe, at),
        repair=options.get("repair", False),
        rule=_rule(recipe),
        common=common,
    )


def _specs(side: Side, at: Paths) -> tuple[LoraSpec, ...]:
    return tuple(lora_spec(at[lora], text.split(":"), text) for lora, text in side.loras)


def _expression(side: Side, at: Paths) -> str:
    loras = [f"{at[lora]}:{strength}" for lora, strength in side.loras]
    text = "+".join(loras if side.model is None else [at[side.model], *loras])
    expected = [*([] if side.model is None else [at[side.model]]), *(at[w] for w, _ in side.loras)]
    # A strength from elsewhere must not name one more file.
    if [spec.path for spec in lora_sum(text)] != expected:
        raise SpecError(f"the strengths {', '.join(strength for _, strength in side.loras)}")
    return text


def _against(recipe: Recipe, at: Paths) -> str | None:
    return None if recipe.against is None else at[recipe.against]


def _rule(recipe: Recipe) -> "RankRule":
    from lorakit.linalg.ranks import RankRule

    given = {field.name: recipe.options.get(field.name) for field in fields(RankRule)}
    return RankRule(**given)
