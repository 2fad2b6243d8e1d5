"""The end of every command that writes: write, verify, report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli._options import Common
from lorakit.cli._progress import watching
from lorakit.cli._render import show_report
from lorakit.errors import SpecError
from lorakit.version import VERSION

if TYPE_CHECKING:
    from lorakit.linalg.ranks import RankRule
    from lorakit.lorafile import LoraFile
    from lorakit.models import Applied
    from lorakit.operations.pieces import Piece
    from lorakit.operations.strength import Strength
    from lorakit.report import Report, Verified
    from lorakit.tensorfile.writer import Written


def show(common: Common, *reports: "Report") -> None:
    """Print reports as the options ask: one JSON value, an object or a list of them."""
    if common.json:
        bodies = [report.as_dict() for report in reports]
        click.echo(json.dumps(bodies[0] if len(bodies) == 1 else bodies, sort_keys=True))
        return
    for report in reports:
        show_report(report, quiet=common.quiet, verbose=common.verbose)


def recipe(command: str, inputs: Sequence[object], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what made a file: inputs with their hashes, options, version."""
    given = {name: value for name, value in sorted(options.items()) if value not in (None, (), "")}
    return {
        "lorakit": VERSION,
        "command": command,
        "inputs": list(inputs),
        "options": given,
    }


def sized(rule: "RankRule", common: Common, *, made_by: Mapping[str, Any]) -> "RankRule":
    """Take what the recipe and --metadata take in the header out of a size for the whole file.

    Raises:
        SpecError: nothing is left.
    """
    from lorakit.tensorfile.metadata import RECIPE_KEY, recipe_json

    if rule.size is None:
        return rule
    told = dict(common.metadata)
    if not common.no_metadata:
        told[RECIPE_KEY] = recipe_json(common.recipe or made_by)
    taken = len(json.dumps(told, ensure_ascii=False).encode())
    if taken >= rule.size:
        raise SpecError(
            f"--size {rule.size} is less than the recipe and --metadata take ({taken} bytes); give "
            "a larger size, or --no-metadata."
        )
    return replace(rule, size=rule.size - taken)


def stored_as(
    stack: "Sequence[tuple[LoraFile, Strength]]", common: Common
) -> "list[tuple[LoraFile, Strength]]":
    """Return a stack in the dtype that is written: a size is spent in bytes of the output."""
    return [(replace(lora, dtype=common.dtype or lora.dtype), s) for lora, s in stack]


def shared_options(common: Common) -> dict[str, Any]:
    """Return what of the options that every writing command has shapes the output's bytes."""
    return {
        "dtype": common.dtype,
        "metadata": common.metadata or None,
        "allow_unmatched": common.allow_unmatched or None,
    }


def rule_options(rule: Any) -> dict[str, Any]:
    """Return the rank rule's options that were given."""
    return {name: getattr(rule, name) for name in type(rule).__dataclass_fields__}


def finish_lora(
    lora: "LoraFile",
    report: "Report",
    common: Common,
    *,
    made_by: Mapping[str, Any],
    inputs: Sequence[Path],
    pieces: "Sequence[Piece]",
    output: Path | None = None,
) -> "Report":
    """Write a LoRA, read it back if asked to before it takes its place, and return the report."""
    from lorakit.operations.verify import verify_lora
    from lorakit.saving import Output, save_lora

    found: list[Verified] = []

    def check(place: Path) -> None:
        with watching(quiet=common.quiet) as progress:
            found.append(
                verify_lora(place, pieces, report, compute=common.compute(), progress=progress)
            )

    written = save_lora(
        output or common.output,
        lora,
        output=Output(
            dtype=common.dtype,
            overwrite=common.overwrite,
            inputs=inputs,
            metadata=common.metadata,
            training=not common.no_metadata,
            recipe=common.recipe or made_by,
            title=common.title,
        ),
        check=check if common.verify else None,
    )
    return _written(report, written, found)


def finish_model(
    applied: "Applied",
    report: "Report",
    common: Common,
    *,
    made_by: Mapping[str, Any],
    inputs: Sequence[Path],
) -> "Report":
    """Write a checkpoint, read it back if asked to before it takes its place; return the report."""
    from lorakit.operations.verify_model import verify_model
    from lorakit.saving import save_model
    from lorakit.tensorfile.hashes import HASHES
    from lorakit.tensorfile.metadata import RECIPE_KEY, recipe_json

    compute = common.compute()
    metadata = {} if common.no_metadata else dict(applied.metadata)
    for stale in HASHES:
        metadata.pop(stale, None)
    if not common.no_metadata:
        metadata[RECIPE_KEY] = recipe_json(common.recipe or made_by)
    applied = replace(applied, metadata=metadata | common.metadata)
    found: list[Verified] = []
    with watching(quiet=common.quiet) as progress:

        def check(place: Path) -> None:
            found.append(verify_model(place, applied, compute=compute, progress=progress))

        written = save_model(
            common.output,
            applied,
            dtype=common.dtype,
            overwrite=common.overwrite,
            inputs=inputs,
            compute=compute,
            progress=progress,
            check=check if common.verify else None,
        )
    return _written(report, written, found)


def _written(report: "Report", written: "Written", found: "Sequence[Verified]") -> "Report":
    return replace(
        report,
        output=str(written.path),
        output_bytes=written.nbytes,
        verified=found[0] if found else None,
    )
