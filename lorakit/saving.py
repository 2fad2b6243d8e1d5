"""A LoRA's way to disk: names, dtype, true metadata, one writer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.compute import Compute
from lorakit.lorafile import LoraFile
from lorakit.models import Applied, Rounded, stored_specs
from lorakit.names.dialects import format_key
from lorakit.peftconfig import CONFIG, WEIGHTS, format_config
from lorakit.peftfolder import ROOT
from lorakit.progress import Progress, silent
from lorakit.tensorfile.header import save_order
from lorakit.tensorfile.metadata import RECIPE_KEY, recipe_json, true_metadata, with_hashes
from lorakit.tensorfile.source import DictSource
from lorakit.tensorfile.writer import Written, cast, write_folder, write_model, write_safetensors

WITH_ALPHA = ("kohya", "kohya-diffusers", "comfyui")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How to write: shared by every command that writes.

    Args:
        dtype: a safetensors dtype name, None for the LoRA's own.
        dialect: the names to write, None for the LoRA's own.
        overwrite: replace an existing file.
        inputs: files that must never be replaced.
        metadata: keys to set.
        training: keep the training metadata.
        recipe: what made the file.
    """

    dtype: str | None = None
    dialect: str | None = None
    overwrite: bool = False
    inputs: Sequence[Path] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    training: bool = True
    recipe: Mapping[str, object] | None = None


def save_lora(path: str | Path, lora: LoraFile, *, output: Output | None = None) -> Written:
    """Write a LoRA: factors cast once, keys sorted, metadata made true.

    A path that ends in `.safetensors` becomes a file; with the PEFT dialect it becomes a folder.

    Raises:
        OutputError: the output exists, is an input, or cannot be written.
        NumericsError: a factor overflows the dtype.
    """
    output = Output() if output is None else output
    dialect = output.dialect or lora.dialect
    place = Path(path)
    if dialect == "peft" and place.suffix != ".safetensors":
        return _save_peft(place, lora, output)
    tensors = stored_tensors(lora, dialect=dialect, dtype=output.dtype or lora.dtype)
    source = _source(tensors, _metadata(lora, place.stem, output), place)
    return write_safetensors(place, source, overwrite=output.overwrite, inputs=output.inputs)


def save_model(
    path: str | Path,
    applied: Applied,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    compute: Compute | None = None,
    progress: Progress = silent,
) -> Written:
    """Write a model with its LoRAs baked in: each touched tensor is the exact sum, rounded once.

    Args:
        path: the file, or the folder where the base is one.
        applied: what `apply` made.
        dtype: a safetensors dtype for all float tensors, None for each tensor's own.
        overwrite: replace an existing file.
        inputs: files that must never be replaced.
        compute: workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        OutputError: the output exists, is an input, or cannot be written.
        NumericsError: a sum overflows the dtype.
    """
    return write_model(
        path,
        Rounded(applied=applied, specs=stored_specs(applied, dtype)),
        overwrite=overwrite,
        inputs=inputs,
        compute=compute or Compute.of(),
        progress=progress,
    )


def stored_tensors(lora: LoraFile, *, dialect: str, dtype: str) -> dict[str, Tensor]:
    """Return a LoRA's tensors by key as a file holds them."""
    tensors: dict[str, Tensor] = {}
    for module, adapter in lora.adapters.items():
        for role, tensor in _roles(adapter, dialect).items():
            key = format_key(module, role, dialect=dialect, architecture=lora.architecture)
            tensors[key] = tensor if role == "alpha" else cast(tensor, dtype, key)
    return tensors


def _roles(adapter: Adapter, dialect: str) -> dict[str, Tensor]:
    tensors = adapter.tensors()
    if dialect in WITH_ALPHA:
        return tensors
    alpha = float(tensors.pop("alpha"))
    scale = alpha / adapter.rank
    if "mid" in tensors:
        factors = adapter.factors()
        scale = 1.0
        up = factors.up.reshape(*factors.up.shape, *(1 for _ in adapter.shape[2:]))
        tensors = {"up": up, "down": factors.down.reshape(-1, *adapter.shape[1:])}
    if scale == 1.0:
        return tensors
    root = math.sqrt(abs(scale))
    up, down = tensors["up"].float(), tensors["down"].float()
    return {"up": up * math.copysign(root, scale), "down": down * root}


def _metadata(lora: LoraFile, title: str, output: Output) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if output.training:
        linear = [a for a in lora.adapters.values() if a.kind == "lora"]
        convs = [a for a in lora.adapters.values() if a.kind != "lora"]
        metadata = true_metadata(
            lora.metadata,
            rank=_one({adapter.rank for adapter in linear or convs}),
            alpha=_one({_alpha(adapter) for adapter in linear or convs}),
            conv_rank=_one({adapter.rank for adapter in convs}),
            conv_alpha=_one({_alpha(adapter) for adapter in convs}),
            base_model_version=lora.architecture.base_model_version if lora.architecture else None,
            modelspec_architecture=lora.architecture.modelspec if lora.architecture else None,
            title=title,
        )
        if output.recipe is not None:
            metadata[RECIPE_KEY] = recipe_json(output.recipe)
    return metadata | {"format": "pt"} | dict(output.metadata)


def _alpha(adapter: Adapter) -> float:
    return float(adapter.tensors()["alpha"])


def _one(values: set[int] | set[float]) -> int | float | None:
    return next(iter(values)) if len(values) == 1 else None


def _source(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], place: Path) -> DictSource:
    specs = DictSource(tensors).specs
    ordered = {key: tensors[key] for key in save_order(specs)}
    plain = DictSource(ordered, name=str(place))
    return DictSource(ordered, with_hashes(plain, metadata), name=str(place))


def _save_peft(place: Path, lora: LoraFile, output: Output) -> Written:
    by_component: dict[str, dict[str, Adapter]] = {}
    for module, adapter in lora.adapters.items():
        component = module.partition(".")[0]
        by_component.setdefault(component, {})[module] = adapter
    folders = {name: name for name in by_component} if len(by_component) > 1 else None
    parts = {}
    texts = {}
    for component, adapters in sorted(by_component.items()):
        below = f"{folders[component]}/" if folders else ""
        part = replace(lora, adapters=adapters)
        tensors = stored_tensors(part, dialect="peft", dtype=output.dtype or lora.dtype)
        parts[below + WEIGHTS[0]] = _source(tensors, _metadata(part, place.name, output), place)
        ranks = {_peft_path(module, part): adapter.rank for module, adapter in adapters.items()}
        texts[below + CONFIG] = format_config(ranks)
    return write_folder(place, parts, texts=texts, overwrite=output.overwrite, inputs=output.inputs)


def _peft_path(module: str, lora: LoraFile) -> str:
    key = format_key(module, "down", dialect="peft", architecture=lora.architecture)
    return key.removeprefix(ROOT).removesuffix(".lora_A.weight")
