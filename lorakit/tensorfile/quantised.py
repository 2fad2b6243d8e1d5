"""Scaled fp8 checkpoints: their weights as plain tensors, and back again with a change.

Source: ComfyUI's `QUANTIZATION.md` and `convert_old_quants`, both of its formats; a scale a row
    as compressed-tensors stores it.
    - stricter: every other quantisation is refused
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import FileFormatError, NumericsError
from lorakit.linalg.rounding8 import rounded_fp8, widened_fp8
from lorakit.tensorfile.dtypes import bytes_of, torch_dtype
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.plain import TensorSource
from lorakit.tensorfile.reading import parse_json

_BLOCK = 2**18
_QUANTIZATION = "_quantization_metadata"

_SCALES = (".scale_weight", ".weight_scale")
_OTHERS = (".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
_CONFIG = ".comfy_quant"
_FORMATS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_FP8 = frozenset(_FORMATS.values())
_SCALE_DTYPES = ("F32", "F16", "BF16")
_REFUSED = {
    ".weight_scale_2": "nvfp4 with scales of scales",
    ".weight_scale_inv": "fp8 with a scale a block",
    ".pre_quant_scale": "smoothed weights",
    ".absmax": "bitsandbytes' 4 or 8 bits",
    ".quant_map": "bitsandbytes' 4 or 8 bits",
    ".SCB": "bitsandbytes' int8",
    ".qweight": "packed integers",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dequantised:
    """A source of scaled fp8 weights as if they were plain: weight · scale, no scales beside.

    Args:
        base: the stored source.
        scales: key of a scaled weight -> key of its scale.
        specs: those of the base, without what belongs to the scaling; the dtypes stay.
        metadata: that of the base, without what tells the scaling.
    """

    base: TensorSource
    scales: Mapping[str, str]
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    def get(self, key: str) -> Tensor:
        """Read a tensor; a scaled one comes as weight · scale in fp32.

        Raises:
            FileFormatError: a scale is not finite.
        """
        tensor = self.base.get(key)
        if key not in self.scales:
            return tensor
        return widened_fp8(tensor).mul_(self.scale(key).float())

    def scale(self, key: str) -> Tensor:
        """Read the scale of a weight in float64, in a shape that multiplies it: [1 or out, 1, …].

        Raises:
            FileFormatError: it is not finite.
        """
        scale = self.base.get(self.scales[key]).double()
        odd = scale[~scale.isfinite()]
        if odd.numel():
            raise FileFormatError(
                f"{self.name}: {self.scales[key]}: expected a finite scale, found "
                f"{float(odd[0]):g}; get the file again."
            )
        return _beside(scale, self.specs[key].shape)

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie, None where they are not what `get` returns."""
        return None if key in self.scales else self.base.extent(key)


def dequantised(source: TensorSource) -> TensorSource:
    """Show a source's scaled fp8 weights as plain tensors; the source itself if it has none.

    Raises:
        FileFormatError: weights are quantised otherwise: int8, 4 bits, scales of blocks.
    """
    scales = _scales_of(source)
    hidden = _companions(source.specs, scales)
    if not hidden:
        return source
    return Dequantised(
        base=source,
        scales=scales,
        specs={key: spec for key, spec in source.specs.items() if key not in hidden},
        metadata={k: text for k, text in source.metadata.items() if k != _QUANTIZATION},
    )


def dequantised_of(source: TensorSource) -> Dequantised | None:
    """Return the dequantised source that a chain of derived ones goes through, if any does."""
    current: TensorSource | None = source
    while current is not None and not isinstance(current, Dequantised):
        current = getattr(current, "base", None)
    return current


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requantised:
    """A changed model as scaled fp8: each touched weight is rounded once, under a fresh scale.

    Args:
        view: the unchanged model.
        changed: the changed model, with the keys of `view`; its `get` gives what has no scale.
        touched: the keys of changed weights.
        merged: gives the changed value of a key in float64 or fp32, the same each time.
        fresh: the scales that are known so far.
    """

    view: Dequantised
    changed: TensorSource
    touched: Collection[str]
    merged: Callable[[str], Tensor]
    fresh: dict[str, Tensor] = field(default_factory=dict)

    @property
    def base(self) -> TensorSource:
        """The stored source, whose files the output follows."""
        return self.view.base

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The base's specs, in its order."""
        return self.base.specs

    @property
    def metadata(self) -> Mapping[str, str]:
        """The changed model's metadata, and the base's account of its scaling."""
        kept = {k: text for k, text in self.base.metadata.items() if k == _QUANTIZATION}
        return {**self.changed.metadata, **kept}

    def get(self, key: str) -> Tensor:
        """Read a tensor as it is stored; a scale costs as much as its weight the first time.

        Raises:
            NumericsError: a changed weight is NaN or infinite.
        """
        weight = self._weight_of(key)
        if weight is None:
            own = key not in self.view.specs or key in self.view.scales
            return self.base.get(key) if own else self.changed.get(key)
        spec = self.specs[self.view.scales[weight]]
        if key != weight:
            return self._scale(weight, None).to(torch_dtype(spec.dtype)).reshape(spec.shape)
        value = self.merged(key)
        scale = self._scale(key, value)
        return _quantised(value, scale, torch_dtype(self.specs[key].dtype))

    def extent(self, key: str) -> Extent | None:
        """Tell where the bytes of an untouched tensor lie."""
        if self._weight_of(key) is not None:
            return None
        plain = key in self.view.specs and key not in self.view.scales
        return self.changed.extent(key) if plain else self.base.extent(key)

    def _weight_of(self, key: str) -> str | None:
        """Return the touched scaled weight that a key is, or is the scale of."""
        weight = key if key in self.view.scales else ""
        for parameter in (".scale_weight", ".weight_scale"):
            if key.endswith(parameter):
                weight = f"{key.removesuffix(parameter)}.weight"
        return weight if weight in self.view.scales and weight in self.touched else None

    def _scale(self, key: str, value: Tensor | None) -> Tensor:
        known = self.fresh.get(key)
        if known is not None:
            return known
        made = self._made(key, self.merged(key) if value is None else value)
        # Two threads may come here at once: the first scale holds for the weight and for itself.
        return self.fresh.setdefault(key, made)

    def _made(self, key: str, value: Tensor) -> Tensor:
        spec = self.specs[self.view.scales[key]]
        scale = fresh_scale(
            value, spec.numel, torch_dtype(self.specs[key].dtype), torch_dtype(spec.dtype)
        )
        if not bool(scale.isfinite().all()):
            raise NumericsError(
                f"{self.name}: {key}: expected finite values, found NaN or infinite ones; check "
                "the inputs for damage and the strengths."
            )
        return scale


def fresh_scale(value: Tensor, rows: int, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
    """Return the scale under which the largest magnitude becomes the largest fp8 number.

    Args:
        value: [out, …].
        rows: 1 for one scale, `out` for a scale a row.
        dtype: the fp8 dtype of the weight.
        stored: the dtype of the scale, to which it is rounded here.

    Returns:
        [rows] in float64, 1 where all is zero; NaN or infinite where a value is.
    """
    if not value.numel():
        return torch.ones(rows, dtype=torch.float64)
    # The reduction along a dimension is five times slower.
    low, high = torch.aminmax(value.reshape(rows, -1), dim=1) if rows > 1 else torch.aminmax(value)
    largest = torch.maximum(-low, high).double().reshape(rows)
    info = torch.finfo(stored)
    # Further down a scale in fp16 has so few bits that rounding it would cut off the largest.
    least = 32 * info.smallest_normal * info.eps
    scale = (largest / torch.finfo(dtype).max).clamp_min(least).to(stored).double()
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def _quantised(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    table = value.reshape(len(value), -1) if value.numel() else value.reshape(0, 1)
    column = scale.reshape(-1, 1).expand(len(table), 1)
    result = torch.empty(table.shape, dtype=dtype)
    step = max(1, _BLOCK // table.shape[1])
    for start in range(0, len(table), step):
        rows = slice(start, start + step)
        result[rows] = rounded_fp8(table[rows].double() / column[rows], dtype)
    return result.reshape(value.shape)


def _beside(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scale.reshape(-1, *(1 for _ in shape[1:]))


def _scales_of(source: TensorSource) -> dict[str, str]:
    """Return the key of each scaled fp8 weight -> the key of its scale.

    Raises:
        FileFormatError: weights are quantised in a way that lorakit does not read.
    """
    for key, spec in source.specs.items():
        found = _refusal(key, spec)
        if found:
            raise _error(source, _layer(key), f"{found} ({key})")
    scales: dict[str, str] = {}
    for key in source.specs:
        if key.endswith(_SCALES):
            layer = _layer(key)
            if f"{layer}.weight" in scales:
                raise _error(source, layer, f"two scales ({scales[f'{layer}.weight']}, {key})")
            _check_scale(source, layer, key)
            scales[f"{layer}.weight"] = key
    for layer, config in _declared(source):
        _check_format(source, layer, config, scales)
    return scales


def _companions(specs: Mapping[str, Spec], scales: Mapping[str, str]) -> frozenset[str]:
    """Return the keys that only tell how the weights are scaled: scales, formats, markers."""
    layers = [key.removesuffix(".weight") for key in scales]
    beside = {layer + other for layer in layers for other in _OTHERS} | set(scales.values())
    markers = (key for key in specs if _is_marker(key))
    return frozenset((*(key for key in beside if key in specs), *markers))


def _is_marker(key: str) -> bool:
    return key == _MARKER or key.endswith(f".{_MARKER}")


def _refusal(key: str, spec: Spec) -> str:
    for ending, what in _REFUSED.items():
        if key.endswith(ending):
            return what
    if ".quant_state." in key:
        return "bitsandbytes' 4 bits"
    if key.endswith(".weight") and spec.dtype in ("I8", "F4"):
        return "int8 weights" if spec.dtype == "I8" else "4-bit weights"
    return ""


def _check_scale(source: TensorSource, layer: str, key: str) -> None:
    scale, weight = source.specs[key], source.specs.get(f"{layer}.weight")
    if weight is None:
        raise _error(source, layer, f"{key} without {layer}.weight")
    if weight.dtype not in _FP8 or not weight.shape:
        raise _error(source, layer, f"{weight.dtype} {list(weight.shape)} with {key}")
    rows = len(weight.shape) > 1 and scale.shape[:1] == weight.shape[:1]
    one = scale.numel == 1
    if not one and not (rows and set(scale.shape[1:]) <= {1}):
        raise _error(source, layer, f"{key} of {list(scale.shape)} for {list(weight.shape)}")
    if scale.dtype not in _SCALE_DTYPES:
        raise _error(source, layer, f"{key} in {scale.dtype}")


def _declared(source: TensorSource) -> Iterator[tuple[str, object]]:
    """Yield the layers that the file itself calls quantised, and what it says of them."""
    text = source.metadata.get(_QUANTIZATION)
    if text is not None:
        table = _parsed(source, _QUANTIZATION, text)
        layers = table.get("layers") if isinstance(table, dict) else None
        if not isinstance(layers, dict):
            raise _error(source, _QUANTIZATION, "a text without layers")
        yield from layers.items()
    for key, spec in source.specs.items():
        if key.endswith(_CONFIG):
            if spec.dtype != "U8":
                raise _error(source, _layer(key), f"{key} in {spec.dtype}")
            yield _layer(key), _parsed(source, key, bytes(bytes_of(source.get(key).contiguous())))


def _check_format(
    source: TensorSource, layer: str, config: object, scales: Mapping[str, str]
) -> None:
    settings: dict[str, Any] = config if isinstance(config, dict) else {}
    name = settings.get("format")
    params = settings.get("params")
    if not isinstance(name, str) or name not in _FORMATS:
        raise _error(source, layer, f"the format {name}")
    if settings.get("convrot") or (isinstance(params, dict) and params.get("convrot")):
        raise _error(source, layer, f"the format {name} of rotated weights")
    weight = source.specs.get(f"{layer}.weight")
    if weight is None:
        return
    if weight.dtype != _FORMATS[name]:
        raise _error(source, layer, f"{weight.dtype} that the file calls {name}")
    if f"{layer}.weight" not in scales:
        raise _error(source, layer, f"the format {name} without a scale")


def _parsed(source: TensorSource, key: str, text: str | bytes) -> object:
    try:
        return parse_json(text)
    except ValueError:
        raise _error(source, key, "a text that is no JSON") from None


def _layer(key: str) -> str:
    for ending in (*_SCALES, *_OTHERS, *_REFUSED):
        if key.endswith(ending):
            return key.removesuffix(ending).removesuffix(".weight")
    return key.partition(".weight")[0]


def _error(source: TensorSource, layer: str, found: str) -> FileFormatError:
    return FileFormatError(
        f"{source.name}: {layer}: expected plain weights, or fp8 with one scale a tensor or a row, "
        f"found {found}; convert the model to fp16 or bf16 first."
    )
