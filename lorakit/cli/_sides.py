"""The two sides of extract: models, LoRAs, stacks, or models on paper."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli._inputs import (
    Loaded,
    UserPresets,
    check_there,
    load_stack,
    lora_sum,
    model_spec,
    side_record,
)
from lorakit.cli._options import Common
from lorakit.errors import SpecError
from lorakit.names.lorakeys import holds_lora

if TYPE_CHECKING:
    from lorakit.lorafile import LoraFile
    from lorakit.names.specs import LoraSpec, ModelSpec
    from lorakit.operations.strength import Strength
    from lorakit.tensorfile.source import TensorSource


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """One side: a model in `source`, or LoRAs alone in `stack`, perhaps on a `base`."""

    source: "TensorSource | None"
    stack: "tuple[tuple[LoraFile, Strength], ...]"
    paths: tuple[Path, ...]
    recipe: Mapping[str, Any]
    base: Path | None = None


def open_sides(
    original: str, tuned: str, *, presets: UserPresets, common: Common
) -> tuple[Side, Side]:
    """Open both sides; two expressions on one base become two stacks, exactly.

    Raises:
        SpecError: one side is a model and the other a LoRA.
    """
    sums = lora_sum(original), lora_sum(tuned)
    before, after = (terms[0].path for terms in sums)
    kinds = is_lora(before), is_lora(after)
    if kinds[0] != kinds[1]:
        lora, model = (before, after) if kinds[0] else (after, before)
        raise SpecError(
            f"{lora} is a LoRA and {model} a model; extract needs two models, or two LoRAs "
            f"(for a LoRA on a model write '{model}+{lora}')."
        )
    if kinds[0]:
        first, second = (_stack_side(terms, None, presets, common) for terms in sums)
        return first, second
    specs = model_spec(original), model_spec(tuned)
    if not _same_file(before, after):
        first, second = (_model_side(spec, presets, common) for spec in specs)
        return first, second
    if not (specs[0].loras or specs[1].loras):
        raise SpecError(f"{before} is on both sides; there is no difference to extract.")
    first, second = (_stack_side(spec.loras, Path(spec.path), presets, common) for spec in specs)
    return first, second


def is_lora(path: str) -> bool:
    """Tell whether a path is a LoRA, a file or a PEFT folder, and no model."""
    check_there(path)
    from lorakit.peftfolder import is_peft_folder
    from lorakit.tensorfile.source import open_source

    if Path(path).is_dir() and is_peft_folder(Path(path)):
        return True
    return holds_lora(open_source(path).specs)


def _same_file(first: str, second: str) -> bool:
    one, other = Path(first), Path(second)
    return one.exists() and other.exists() and one.samefile(other)


def _stack_side(
    specs: "tuple[LoraSpec, ...]", base: Path | None, presets: UserPresets, common: Common
) -> Side:
    """LoRAs alone, or the LoRAs of an expression whose base is on both sides and cancels."""
    loaded = _load(specs, presets, common) if specs else Loaded(specs=(), stack=())
    return Side(
        source=None,
        stack=loaded.stack,
        paths=loaded.paths if base is None else (*loaded.paths, base),
        recipe=side_record(base, loaded),
        base=base,
    )


def _load(specs: "tuple[LoraSpec, ...]", presets: UserPresets, common: Common) -> Loaded:
    return load_stack(
        specs,
        presets=presets,
        header_only=common.dry_run,
        allow_unmatched=common.allow_unmatched,
    )


def _model_side(spec: "ModelSpec", presets: UserPresets, common: Common) -> Side:
    from lorakit.compute import Compute
    from lorakit.operations.apply import apply
    from lorakit.tensorfile.source import open_source

    source: TensorSource = open_source(spec.path)
    loaded = _load(spec.loras, presets, common) if spec.loras else Loaded(specs=(), stack=())
    if spec.loras:
        source, _ = apply(
            source,
            loaded.stack,
            allow_unmatched=common.allow_unmatched,
            compute=Compute(device=common.compute().device),
        )
    return Side(
        source=source,
        stack=(),
        paths=(Path(spec.path), *loaded.paths),
        recipe=side_record(spec.path, loaded),
    )
