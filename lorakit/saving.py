"""A LoRA's way to disk: names, dtype, true metadata, one writer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lorakit.adapters import Adapter, Dora, Lora, Rotated
from lorakit.compute import Compute
from lorakit.errors import AdapterError
from lorakit.fusing import as_named
from lorakit.lorafile import LoraFile
from lorakit.models import Applied, Rounded, stored_specs
from lorakit.names.checkpoints import BIAS
from lorakit.names.dialects import format_key
from lorakit.peftconfig import CONFIG, WEIGHTS, PeftLayer, format_config
from lorakit.peftfolder import COMPONENTS, ROOT
from lorakit.progress import Progress, silent
from lorakit.report import name_some
from lorakit.tensorfile.header import save_order
from lorakit.tensorfile.metadata import RECIPE_KEY, recipe_json, true_metadata
from lorakit.tensorfile.quantised import Requantised, dequantised_of
from lorakit.tensorfile.source import DictSource, TensorSource
from lorakit.tensorfile.writer import (
    Check,
    Written,
    cast,
    write_folder,
    write_model,
    write_safetensors,
)

WITH_ALPHA = ("kohya", "kohya-diffusers", "comfyui")
EXACT = ("alpha", "scale", "on_input")
"""Numbers that are stored as they are, whatever the dtype."""


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
        title: modelspec's title; the file's name if left out.
    """

    dtype: str | None = None
    dialect: str | None = None
    overwrite: bool = False
    inputs: Sequence[Path] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    training: bool = True
    recipe: Mapping[str, object] | None = None
    title: str | None = None


def save_lora(
    path: str | Path, lora: LoraFile, *, output: Output | None = None, check: Check | None = None
) -> Written:
    """Write a LoRA: factors cast once, keys sorted, metadata made true.

    Args:
        path: what ends in `.safetensors` becomes a file; with the PEFT dialect others are folders.
        lora: the LoRA.
        output: dtype, names, metadata; without it all as it is, and no file is replaced.
        check: is given the place of the whole output before it takes that of an old one.

    Raises:
        OutputError: the output exists, is an input, or cannot be written.
        NumericsError: a factor overflows the dtype.
    """
    output = Output() if output is None else output
    dialect = output.dialect or lora.dialect
    lora = as_named(lora, dialect)
    place = Path(path)
    if dialect == "peft" and place.suffix != ".safetensors":
        return _save_peft(place, lora, output, check)
    tensors = stored_tensors(lora, dialect=dialect, dtype=output.dtype or lora.dtype)
    source = _source(tensors, _metadata(lora, place.stem, output), place)
    return write_safetensors(
        place, source, overwrite=output.overwrite, inputs=output.inputs, check=check
    )


def save_model(
    path: str | Path,
    applied: Applied,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    compute: Compute | None = None,
    progress: Progress = silent,
    check: Check | None = None,
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
        check: given the place of the whole output before it takes that of an old one.

    Raises:
        OutputError: the output exists, is an input, or cannot be written.
        NumericsError: a sum overflows the dtype.
    """
    return write_model(
        path,
        _stored(applied, dtype),
        overwrite=overwrite,
        inputs=inputs,
        compute=compute or Compute.of(),
        progress=progress,
        check=check,
    )


def _stored(applied: Applied, dtype: str | None) -> TensorSource:
    """Return what is written: scaled fp8 gets a fresh scale unless another dtype is asked for."""
    rounded = Rounded(applied=applied, specs=stored_specs(applied, dtype))
    view = dequantised_of(applied)
    if view is None or dtype is not None:
        return rounded
    return Requantised(view=view, changed=rounded, touched=touched(applied), merged=applied.exact)


def touched(applied: Applied) -> frozenset[str]:
    """Return the keys that a model on paper changes, those of an expression inside it too."""
    keys: set[str] = set()
    current: TensorSource = applied
    while isinstance(current, Applied):
        keys.update(current.addends)
        current = current.base
    return frozenset(keys)


def stored_tensors(lora: LoraFile, *, dialect: str, dtype: str) -> dict[str, Tensor]:
    """Return a LoRA's tensors by key as a file holds them.

    Raises:
        AdapterError: the dialect has no names for a kind of adapter.
    """
    tensors: dict[str, Tensor] = dict(lora.carried)
    for module, adapter in lora.adapters.items():
        layer = module.removesuffix(BIAS)
        for role, tensor in _roles(lora, module, adapter, dialect).items():
            key = format_key(layer, role, dialect=dialect, architecture=lora.architecture)
            kept = role in EXACT or not tensor.is_floating_point()
            tensors[key] = tensor if kept else cast(tensor, dtype, key)
    return tensors


def _roles(lora: LoraFile, module: str, adapter: Adapter, dialect: str) -> dict[str, Tensor]:
    tensors = adapter.tensors()
    if isinstance(adapter, Rotated):
        raise AdapterError(
            f"{lora.name}: {module} is {adapter.kind}, which only PEFT's own folders hold; bake it "
            "with --into, or convert it with --as lora --against MODEL first."
        )
    if module.endswith(BIAS) and "diff" in tensors:
        tensors = {"diff_b": tensors["diff"]}
    if dialect in WITH_ALPHA:
        return tensors
    layer = lora.adapters.get(module.removesuffix(BIAS))
    if module.endswith(BIAS) and "diff_b" in tensors and isinstance(layer, Lora):
        # PEFT scales the bias as it scales the factors.
        scale = 1.0 if dialect == "diffusers" or layer.mid is not None else layer.scale
        if scale:
            return {"lora_B.bias": tensors["diff_b"].float() / scale}
    if isinstance(adapter, Lora):
        return _without_alpha(adapter, folded=dialect == "diffusers")
    if isinstance(adapter, Dora) and isinstance(adapter.inner, Lora) and adapter.axis == "output":
        factors = _without_alpha(adapter.inner, folded=dialect == "diffusers")
        return factors | {"lora_magnitude_vector": _as_peft(adapter)}
    raise AdapterError(
        f"{lora.name}: {module} expected a LoRA or a DoRA by output, which are all that {dialect} "
        f"has names for, found {adapter.kind}; write kohya or comfyui, or convert it --as lora."
    )


def _as_peft(adapter: Dora) -> Tensor:
    """Return the magnitude as PEFT shapes it: [out], or [1, out, 1, 1] of a convolution."""
    flat = adapter.magnitude.reshape(-1)
    return flat if len(adapter.shape) == 2 else flat.reshape(1, -1, *(1 for _ in adapter.shape[2:]))


def _without_alpha(adapter: Lora, *, folded: bool) -> dict[str, Tensor]:
    """Return `up` and `down` for a dialect without alpha.

    Args:
        adapter: a LoRA; a Tucker core is multiplied into `down`.
        folded: put the scale into the factors: its power of two into both, which rounds nothing,
            the rest into `up`. PEFT's configuration holds alpha instead.
    """
    up, down, scale = adapter.up, adapter.down, adapter.scale
    if adapter.mid is not None:
        factors = adapter.change()
        up = factors.up.reshape(*factors.up.shape, *(1 for _ in adapter.shape[2:])).float()
        down = factors.down.reshape(-1, *adapter.shape[1:]).float()
        scale = 1.0
    if not folded or scale == 1.0:
        return {"up": up, "down": down}
    rest, power = math.frexp(scale)
    rest, power = (rest * 2, power - 1) if abs(rest) == 0.5 else (rest, power)
    half = power // 2
    return {"up": up.float() * (rest * 2.0 ** (power - half)), "down": down.float() * 2.0**half}


def _metadata(lora: LoraFile, title: str, output: Output) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if output.training:
        ranked = [a for a in lora.adapters.values() if a.rank is not None]
        linear = [a for a in ranked if math.prod(a.shape[2:]) == 1]
        convs = [a for a in ranked if math.prod(a.shape[2:]) > 1]
        metadata = true_metadata(
            lora.metadata,
            rank=_one(adapter.rank for adapter in linear or convs),
            alpha=_one(_alpha(adapter) for adapter in linear or convs),
            conv_rank=_one(adapter.rank for adapter in convs),
            conv_alpha=_one(_alpha(adapter) for adapter in convs),
            base_model_version=lora.architecture.base_model_version if lora.architecture else None,
            modelspec_architecture=lora.architecture.modelspec if lora.architecture else None,
            title=title if output.title is None else output.title,
        )
        if output.recipe is not None:
            metadata[RECIPE_KEY] = recipe_json(output.recipe)
    return metadata | {"format": "pt"} | dict(output.metadata)


def _alpha(adapter: Adapter) -> float | None:
    alpha = adapter.tensors().get("alpha")
    return None if alpha is None else float(alpha)


def _one(values: Iterable[float | None]) -> float | None:
    found = set(values)
    return next(iter(found)) if len(found) == 1 else None


def _source(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], place: Path) -> DictSource:
    specs = DictSource(tensors).specs
    ordered = {key: tensors[key] for key in save_order(specs)}
    return DictSource(ordered, metadata, name=str(place), lent=True, hashed=True)


def _save_peft(place: Path, lora: LoraFile, output: Output, check: Check | None) -> Written:
    by_component: dict[str, dict[str, Adapter]] = {}
    for module, adapter in lora.adapters.items():
        component = module.partition(".")[0]
        by_component.setdefault(component, {})[module] = adapter
    several = len(by_component) > 1
    strange = [name for name in by_component if name not in COMPONENTS]
    # A folder's name must never come from a file.
    if several and strange:
        raise AdapterError(
            f"{lora.name}: expected layers of {', '.join(COMPONENTS)}, which PEFT has folders for, "
            f"found {name_some(strange)}; write a .safetensors file."
        )
    parts = {}
    texts = {}
    for component, adapters in sorted(by_component.items()):
        below = f"{component}/" if several else ""
        part = replace(lora, adapters=adapters)
        tensors = stored_tensors(part, dialect="peft", dtype=output.dtype or lora.dtype)
        parts[below + WEIGHTS[0]] = _source(tensors, _metadata(part, place.name, output), place)
        texts[below + CONFIG] = format_config(_peft_layers(part))
    return write_folder(
        place,
        parts,
        texts=texts,
        overwrite=output.overwrite,
        inputs=output.inputs,
        check=check,
    )


def _peft_layers(lora: LoraFile) -> dict[str, PeftLayer]:
    layers = {}
    for module, adapter in lora.adapters.items():
        inner = adapter.inner if isinstance(adapter, Dora) else adapter
        if not isinstance(inner, Lora):
            continue
        key = format_key(module, "down", dialect="peft", architecture=lora.architecture)
        layers[key.removeprefix(ROOT).removesuffix(".lora_A.weight")] = PeftLayer(
            rank=inner.rank,
            alpha=inner.alpha if inner.mid is None else float(inner.rank),
            dora=isinstance(adapter, Dora),
            bias=module + BIAS in lora.adapters,
        )
    return layers
