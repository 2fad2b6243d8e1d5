"""Where a module lives in a model, and models that exist only on paper."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorakit.errors import FileFormatError
from lorakit.linalg.factored import Factors
from lorakit.linalg.rounding import rounded_sum
from lorakit.names.architectures import Target
from lorakit.names.checkpoints import CheckpointIndex, index_checkpoint
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.source import TensorSource, torch_dtype

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv", ".absmax", ".comfy_quant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of one module: a key, and rows of it where the key holds several modules."""

    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    transpose: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A source of tensors, and which module each of them is."""

    source: TensorSource
    index: CheckpointIndex

    def slot(self, module: str) -> Slot | None:
        """Return the place of a module, None where the model lacks it."""
        target = self.index.find(module)
        return None if target is None else _slot(target, self.source.specs[target.key])

    def weight(self, module: str) -> Tensor:
        """Read a module's weight as [out, in · kh · kw] in fp32.

        Raises:
            FileFormatError: the model lacks the module.
        """
        slot = self.slot(module)
        if slot is None:
            raise FileFormatError(f"{self.source.name}: expected a weight of {module}, found none.")
        tensor = self.source.get(slot.key)
        if slot.transpose:
            tensor = tensor.T
        start, stop = slot.rows
        return tensor[start:stop].flatten(1).float()


def open_model(source: TensorSource) -> Model:
    """Find the modules of a model among its keys.

    Raises:
        FileFormatError: its weights are quantised with scales that lorakit does not apply.
    """
    scaled = [key for key in source.specs if key.endswith(_SCALES) or key.endswith("scaled_fp8")]
    if scaled:
        raise FileFormatError(
            f"{source.name}: expected plain weights, found quantised ones ({scaled[0]}); "
            "convert the model to fp16 or bf16 first."
        )
    try:
        index = index_checkpoint({key: spec.shape for key, spec in source.specs.items()})
    except FileFormatError as error:
        raise FileFormatError(f"{source.name}: {error}") from None
    return Model(source=source, index=index)


def _slot(target: Target, spec: Spec) -> Slot:
    shape = spec.shape[::-1] if target.transpose else spec.shape
    start, stop, of = target.part or (0, 1, 1)
    rows = (shape[0] * start // of, shape[0] * stop // of)
    return Slot(
        key=target.key,
        shape=(rows[1] - rows[0], *shape[1:]),
        rows=rows,
        transpose=target.transpose,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Addend:
    """A ΔW for some rows of one tensor, its factors made when they are asked for."""

    rows: tuple[int, int]
    transpose: bool
    factors: Callable[[], Factors]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Applied:
    """A base with ΔW added on the way out: the same specs, no rounding, nothing on disk.

    Args:
        base: the source that the ΔW are added to.
        addends: key -> what is added there.
        device: where the sums are made.
    """

    base: TensorSource
    addends: Mapping[str, tuple[Addend, ...]]
    metadata: Mapping[str, str]
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The base's specs."""
        return self.base.specs

    def get(self, key: str) -> Tensor:
        """Read a tensor; one that a ΔW touches comes in fp32 at least, unrounded."""
        tensor = self.base.get(key)
        if key not in self.addends:
            return tensor
        value = tensor.to(self.device, torch.promote_types(_wide(tensor.dtype), torch.float32))
        for addend in self.addends[key]:
            factors = addend.factors()
            place = _side(value, addend)[slice(*addend.rows)]
            delta = factors.up.to(value) @ factors.down.to(value)
            place += delta.view_as(place)
        return value.cpu()

    def extent(self, key: str) -> Extent | None:
        """Tell where the bytes of an untouched tensor lie."""
        return None if key in self.addends else self.base.extent(key)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """An `Applied` as it is stored: each touched tensor is the exact sum, rounded once."""

    applied: Applied
    specs: Mapping[str, Spec]

    @property
    def base(self) -> TensorSource:
        """The source whose files the output follows."""
        return self.applied.base

    @property
    def name(self) -> str:
        """The base's name."""
        return self.applied.name

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata to store."""
        return self.applied.metadata

    def get(self, key: str) -> Tensor:
        """Read a tensor, a touched one rounded to its stored dtype."""
        if key not in self.applied.addends:
            return self.applied.get(key)
        stored = torch_dtype(self.specs[key].dtype)
        addends = self.applied.addends[key]
        if stored.itemsize < 2 or _overlap(addends):
            return self.applied.get(key)
        value = self.applied.base.get(key).to(self.applied.device)
        if len(addends) == 1 and addends[0].rows == (0, len(_side(value, addends[0]))):
            total = _stored_sum(_side(value, addends[0]), addends[0], stored)
            return (total.T.contiguous() if addends[0].transpose else total).cpu()
        result = value.to(stored, copy=True)
        for addend in addends:
            place = slice(*addend.rows)
            _side(result, addend)[place] = _stored_sum(_side(value, addend)[place], addend, stored)
        return result.cpu()

    def extent(self, key: str) -> Extent | None:
        """Tell where the bytes of a tensor lie that is neither touched nor stored otherwise."""
        kept = self.specs[key] == self.applied.specs[key]
        return self.applied.extent(key) if kept else None


def stored_specs(applied: Applied, dtype: str | None) -> dict[str, Spec]:
    """Return the specs to write: each float tensor in `dtype`, its own where there is none."""
    return {
        key: Spec(dtype, spec.shape) if dtype and spec.dtype in FLOATS else spec
        for key, spec in applied.specs.items()
    }


def _stored_sum(value: Tensor, addend: Addend, stored: torch.dtype) -> Tensor:
    factors = addend.factors()
    flat = value.reshape(value.shape[0], math.prod(value.shape[1:]))
    device = value.device
    # In place where the dtype stays: fresh pages cost as much as the sum.
    out = flat if flat.dtype == stored and flat.is_contiguous() else None
    total = rounded_sum(flat, factors.up.to(device), factors.down.to(device), stored, out=out)
    return total.reshape(value.shape)


def _side(tensor: Tensor, addend: Addend) -> Tensor:
    return tensor.T if addend.transpose else tensor


def _overlap(addends: tuple[Addend, ...]) -> bool:
    spans = sorted(addend.rows for addend in addends)
    mixed = len({addend.transpose for addend in addends}) > 1
    return mixed or any(a[1] > b[0] for a, b in pairwise(spans))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 2 else dtype
