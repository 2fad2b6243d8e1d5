"""Where a module lives in a model, and models that exist only on paper."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorakit.errors import FileFormatError, NumericsError
from lorakit.linalg.factored import Factors, Framed
from lorakit.linalg.rounding import rounded_add, rounded_sum, rounded_tiles
from lorakit.linalg.rounding8 import rounded8_add, rounded8_sum
from lorakit.linalg.tiles import Change, Tiled, dense, difference, subtracted
from lorakit.names.architectures import Target
from lorakit.names.checkpoints import BIAS, CheckpointIndex, index_checkpoint
from lorakit.tensorfile.blocks import blocks
from lorakit.tensorfile.casting import changes
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.quantised import dequantised
from lorakit.tensorfile.source import TensorSource, torch_dtype

Addition = Factors | Tensor | Tiled
"""A ΔW as it is added."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of one module: a key, and rows of it where the key holds several modules.

    `transpose` and `swap` tell how the tensor is turned, or its halves exchanged, there.
    """

    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    transpose: bool
    swap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A source of tensors, and which module each of them is."""

    source: TensorSource
    index: CheckpointIndex

    def slot(self, module: str) -> Slot | None:
        """Return the place of a module or of its `.bias`, None where the model lacks it.

        Raises:
            FileFormatError: the weight there is of integers or complex numbers.
        """
        target = self.index.find(module)
        if target is None:
            return None
        spec = self.source.specs[target.key]
        if spec.dtype not in FLOATS:
            raise FileFormatError(
                f"{self.source.name}: {module} ({target.key}) expected weights in "
                f"{', '.join(FLOATS)}, found {spec.dtype}; get the model as fp16, bf16 or fp8."
            )
        return _slot(target, spec)

    def parts(self, module: str) -> tuple[str, ...]:
        """Return where a module's weight is: itself, or the parts that the model holds apart.

        Empty where the model lacks it.
        """
        if self.index.find(module) is not None:
            return (module,)
        layer, bias = (module.removesuffix(BIAS), BIAS) if module.endswith(BIAS) else (module, "")
        members = tuple(part + bias for part, _ in self.index.members(layer))
        return members if all(self.index.find(part) is not None for part in members) else ()

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight; of parts that the model holds apart, joined."""
        slots = [slot for part in self.parts(module) if (slot := self.slot(part)) is not None]
        return (sum(slot.shape[0] for slot in slots), *slots[0].shape[1:])

    def place(self, module: str) -> tuple[str, int]:
        """Return the file and the offset where a module's bytes begin; ("", 0) where in none."""
        slot = self.slot(self.parts(module)[0])
        extent = None if slot is None else self.source.extent(slot.key)
        return ("", 0) if extent is None else (str(extent.path), extent.offset)

    def weight(self, module: str) -> Tensor:
        """Read a module's weight as [out, in · kh · kw] in fp32, a vector as one column.

        Raises:
            FileFormatError: the model lacks the module.
        """
        return self.stored(module).float()

    def stored(self, module: str) -> Tensor:
        """Read a module's weight as `weight` does, in the dtype that the file has.

        Raises:
            FileFormatError: the model lacks the module.
        """
        parts = [self._read(slot) for p in self.parts(module) if (slot := self.slot(p)) is not None]
        if not parts:
            raise FileFormatError(f"{self.source.name}: expected a weight of {module}, found none.")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def difference(self, module: str, other: "Model", out: Tensor) -> None:
        """Write this model's weight of a module less another's to `out`.

        Where both lie in their files as they are, neither is ever whole in memory.

        Args:
            module: of both models.
            other: the model that is subtracted.
            out: [out, in · kh · kw] in fp32.

        Raises:
            FileFormatError: a model lacks the module.
        """
        ours, theirs = self._span(module), other._span(module)
        if ours is None or theirs is None:
            difference(self.stored(module), other.stored(module), out)
            return
        pairs = zip(blocks(self.source, *ours), blocks(other.source, *theirs), strict=True)
        subtracted(pairs, out)

    def streams(self, module: str) -> bool:
        """Tell whether a weight can be read block by block: it lies in a file as it is."""
        span = self._span(module)
        return span is not None and self.source.extent(span[0]) is not None

    def _span(self, module: str) -> tuple[str, int, int] | None:
        """Return the key and the elements that hold a module as it is, None where it is turned."""
        if self.parts(module) != (module,):
            return None
        slot = self.slot(module)
        if slot is None or slot.transpose or slot.swap:
            return None
        width = math.prod(slot.shape[1:])
        return slot.key, slot.rows[0] * width, slot.rows[1] * width

    def _read(self, slot: Slot) -> Tensor:
        tensor = self.source.get(slot.key)
        if slot.transpose:
            tensor = tensor.T
        start, stop = slot.rows
        tensor = tensor[start:stop].reshape(stop - start, math.prod(slot.shape[1:]))
        return swapped(tensor) if slot.swap else tensor


def swapped(tensor: Tensor) -> Tensor:
    """Exchange the two halves of the rows."""
    return tensor.roll(len(tensor) // 2, 0)


def open_model(source: TensorSource) -> Model:
    """Find the modules of a model among its keys.

    Raises:
        FileFormatError: its weights are quantised with scales that lorakit does not apply.
    """
    source = dequantised(source)
    # A single number or a tensor without any is no weight, whatever it is called.
    shapes = {key: spec.shape for key, spec in source.specs.items() if spec.shape and spec.numel}
    try:
        index = index_checkpoint(shapes)
    except FileFormatError as error:
        raise FileFormatError(f"{source.name}: {error}") from None
    return Model(source=source, index=index)


def _slot(target: Target, spec: Spec) -> Slot:
    shape = spec.shape[::-1] if target.transpose and len(spec.shape) > 1 else spec.shape
    start, stop, of = target.part or (0, 1, 1)
    rows = (shape[0] * start // of, shape[0] * stop // of)
    return Slot(
        key=target.key,
        shape=(rows[1] - rows[0], *shape[1:]),
        rows=rows,
        transpose=target.transpose and len(spec.shape) > 1,
        swap=target.swap,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Addend:
    """A ΔW for some rows of one tensor, made when it is asked for.

    Args:
        rows: of the tensor, turned where `transpose` says so.
        transpose: whether the tensor holds the transposed weight.
        swap: whether it holds the two halves of the rows the other way round.
        needs_base: whether ΔW depends on the weight.
        dense: whether ΔW is made as a whole matrix, not as factors.
        change: makes ΔW from the weight [out, in · kh · kw] in fp32, or from None.
    """

    rows: tuple[int, int]
    transpose: bool
    swap: bool = False
    needs_base: bool = False
    dense: bool = False
    change: Callable[[Tensor | None], Change]

    def on(self, tensor: Tensor) -> Addition:
        """Return what is added to these rows of the unchanged tensor, as they lie there."""
        base = None
        if self.needs_base:
            place = _side(tensor, self)[slice(*self.rows)]
            base = place.reshape(len(place), -1).float()
            base = swapped(base) if self.swap else base
        change = self.change(base)
        if isinstance(change, Framed):
            change = change.factors()
        if not self.swap:
            return change
        if isinstance(change, Factors):
            return Factors(up=swapped(change.up), down=change.down)
        return swapped(dense(change))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Applied:
    """A base with ΔW added on the way out: the same specs, no rounding, nothing on disk.

    Args:
        base: the source that the ΔW are added to.
        addends: key -> what is added there.
        metadata: the text beside the tensors.
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
        return self._sum(key, tensor, torch.promote_types(_wide(tensor.dtype), torch.float32))

    def exact(self, key: str) -> Tensor:
        """Read a tensor that a ΔW touches in float64: the sum before any rounding."""
        tensor = self.base.get(key)
        return self._sum(key, tensor, torch.float64) if key in self.addends else tensor.double()

    def _sum(self, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        value = tensor.to(self.device, dtype)
        changes = [(addend, addend.on(tensor)) for addend in self.addends[key]]
        for addend, change in changes:
            place = _side(value, addend)[slice(*addend.rows)]
            if isinstance(change, Factors):
                delta = change.up.to(value) @ change.down.to(value)
            else:
                delta = dense(change).to(value)
            place += delta.reshape(place.shape)
        return value.cpu()

    def changes(self, key: str) -> bool:
        """Tell whether a ΔW touches a tensor, here or in the base."""
        return key in self.addends or changes(self.base, key)

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
        if _overlap(addends):
            return self.applied.get(key)
        try:
            return self._rounded(key, addends, stored)
        except NumericsError as error:
            raise NumericsError(f"{self.name}: {key}: {error}") from None

    def _rounded(self, key: str, addends: tuple[Addend, ...], stored: torch.dtype) -> Tensor:
        value = self.applied.base.get(key).to(self.applied.device)
        changes = [(addend, addend.on(value)) for addend in addends]
        if len(addends) == 1 and addends[0].rows == (0, len(_side(value, addends[0]))):
            ((addend, change),) = changes
            total = _stored_sum(_side(value, addend), change, stored)
            return (total.T.contiguous() if addend.transpose else total).cpu()
        result = value.to(stored, copy=True)
        for addend, change in changes:
            place = slice(*addend.rows)
            part = _side(value, addend)[place]
            _side(result, addend)[place] = _stored_sum(part, change, stored)
        return result.cpu()

    def changes(self, key: str) -> bool:
        """Tell whether a ΔW touches a tensor."""
        return self.applied.changes(key)

    def bytes_an_element(self, key: str) -> int:
        """Return what computing a tensor takes for each of its elements.

        The tensor as read and as stored; in fp32 besides where it is summed at that or has less
        than 16 bits; for a dense ΔW its base, its direction and itself in fp64.
        """
        addends = self.applied.addends.get(key, ())
        if any(addend.dense for addend in addends):
            return 56
        sizes = [
            torch_dtype(specs[key].dtype).itemsize for specs in (self.applied.specs, self.specs)
        ]
        return 16 if min(sizes) < 2 or _overlap(addends) else sum(sizes)

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


def _stored_sum(value: Tensor, change: Addition, stored: torch.dtype) -> Tensor:
    flat = value.reshape(value.shape[0], math.prod(value.shape[1:]))
    device = value.device
    if stored.itemsize < 2:
        if isinstance(change, Factors):
            total = rounded8_sum(flat, change.up.to(device), change.down.to(device), stored)
        else:
            total = rounded8_add(flat, dense(change).to(device).reshape(flat.shape), stored)
        return total.reshape(value.shape)
    # In place where the dtype stays: fresh pages cost as much as the sum.
    out = flat if flat.dtype == stored and flat.is_contiguous() else None
    if isinstance(change, Factors):
        total = rounded_sum(flat, change.up.to(device), change.down.to(device), stored, out=out)
    elif isinstance(change, Tensor):
        total = rounded_add(flat, change.to(device).reshape(flat.shape), stored, out=out)
    else:
        total = rounded_tiles(flat, change, stored, out=out)
    return total.reshape(value.shape)


def _side(tensor: Tensor, addend: Addend) -> Tensor:
    return tensor.T if addend.transpose else tensor


def _overlap(addends: tuple[Addend, ...]) -> bool:
    spans = sorted(addend.rows for addend in addends)
    mixed = len({addend.transpose for addend in addends}) > 1
    return mixed or any(a[1] > b[0] for a, b in pairwise(spans))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 2 else dtype
