"""What the layers of a LoRA do: norm, share, effective rank, and how much of the model that is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters import Adapter, is_vector
from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, NumericsError, UnmatchedError
from lorakit.linalg.factored import decomposed
from lorakit.linalg.tiles import size
from lorakit.lorafile import LoraFile, load_lora
from lorakit.models import Model, open_model
from lorakit.names.kinds import kind_of
from lorakit.operations.apply import FIRST_LAYERS
from lorakit.operations.faults import faults, odd_modules
from lorakit.operations.inspection import Group, Inspection
from lorakit.operations.spectrum import spectrum_of
from lorakit.operations.stack import flat, known
from lorakit.report import name_some
from lorakit.tensorfile.source import TensorSource


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """One layer's ΔW.

    Args:
        sigma: its singular values in fp64, falling; zeros where it is dead.
        vector: whether it is a bias or a norm, which has no rank.
        weight: ‖W‖ in the model, None where none was named or it lacks the layer.
    """

    sigma: Tensor
    vector: bool = False
    weight: float | None = None

    @property
    def energy(self) -> float:
        """‖ΔW‖²."""
        return float((self.sigma**2).sum())

    @property
    def outgrown(self) -> bool:
        """Whether ‖ΔW‖ is above ‖W‖; a weight of zeros has nothing to outgrow."""
        return bool(self.weight) and self.energy > (self.weight or 0.0) ** 2

    @property
    def effective_rank(self) -> float:
        """‖ΔW‖² / σ₁², 0 where it is dead."""
        return self.energy / float(self.sigma[0]) ** 2 if self.energy else 0.0


def measured(
    found: Inspection, place: Path, *, spectrum: bool, against: TensorSource | None
) -> Inspection:
    """Read a LoRA and fill in what its layers do.

    Args:
        found: what its header says.
        place: the file or folder.
        spectrum: say what each rank would keep, too.
        against: the model for ‖ΔW‖ / ‖W‖, and for layers whose change depends on it.

    Raises:
        UnmatchedError: the model has none of the layers.
        AdapterError: a layer of the model has another shape.
        NumericsError: a weight of the model holds NaN or infinity.

    Cost: one read of the LoRA and of the weights that it changes; an SVD from the factors a layer.
    """
    lora, odd = _loaded(place)
    model = None if against is None else open_model(against)
    layers = _layers(lora, model)
    names = {module: (lora.block(module), kind_of(module)) for module in layers}
    whole = math.fsum(layer.energy for layer in layers.values())
    dead = tuple(module for module, layer in layers.items() if not layer.energy)
    large = tuple(module for module, layer in layers.items() if layer.outgrown)

    def fill(group: Group, *, block: str | None = None, kind: str | None = None) -> Group:
        inside = [
            layers[module]
            for module, (its_block, its_kind) in names.items()
            if block in (None, its_block) and kind in (None, its_kind)
        ]
        return _filled(group, inside, whole)

    return replace(
        found,
        blocks=tuple(fill(block, block=block.id) for block in found.blocks),
        kinds=tuple(fill(kind, kind=kind.id) for kind in found.kinds),
        cells={
            block: tuple(fill(kind, block=block, kind=kind.id) for kind in kinds)
            for block, kinds in found.cells.items()
        },
        norm=math.sqrt(whole),
        dead=dead,
        unmeasured=tuple(module for module in lora.adapters if module not in layers),
        not_finite=odd,
        faults=faults(lora, dead=dead, odd=odd, large=large),
        spectrum=spectrum_of(layers, lora.block, found.blocks) if spectrum else None,
        against=None if against is None else against.name,
        unmatched=() if model is None else _unmatched(lora, model),
    )


def _loaded(place: Path) -> tuple[LoraFile, tuple[str, ...]]:
    """Read a LoRA without the layers that hold NaN or infinity; return their names too."""
    try:
        return load_lora(place, allow_unmatched=True, mapped=True), ()
    except NumericsError:
        odd = odd_modules(place)
        return load_lora(place, allow_unmatched=True, without=odd, mapped=True), odd


def _unmatched(lora: LoraFile, model: Model) -> tuple[str, ...]:
    unmatched = tuple(module for module in lora.adapters if not model.parts(module))
    if len(unmatched) == len(lora.adapters):
        raise UnmatchedError(
            f"{model.source.name}: none of the LoRA's layers has a place in this model "
            f"({name_some(unmatched)}); is it the right model?"
        )
    return unmatched


def _layers(lora: LoraFile, model: Model | None) -> dict[str, Layer]:
    """Measure every layer whose change is known, in the order of the LoRA."""

    def measure(module: str) -> Layer:
        try:
            return _layer(lora.adapters[module], module, model)
        except AdapterError as error:
            raise AdapterError(f"{lora.name}: {module} {error}.") from None

    known_here = [
        module
        for module, adapter in lora.adapters.items()
        if not adapter.needs_base or (model is not None and model.parts(module))
    ]
    compute = Compute.of(device="cpu")
    cost = _cost(lora, model)
    found = ordered_map(measure, known_here, compute=compute, cost=cost)
    return dict(zip(known_here, found, strict=True))


def _layer(adapter: Adapter, module: str, model: Model | None) -> Layer:
    weight = None
    if model is not None and model.parts(module):
        weight = model.weight(module)
        _check_shape(adapter, module, model)
    change = adapter.change(weight) if adapter.needs_base else adapter.change()
    return Layer(
        sigma=_values(change) if isinstance(change, Tensor) else decomposed(change).s,
        vector=is_vector(adapter.shape),
        weight=None if weight is None or model is None else _size(weight, module, model),
    )


def _size(weight: Tensor, module: str, model: Model) -> float:
    found = size(weight)
    if not math.isfinite(found):
        raise NumericsError(
            f"{model.source.name}: {module} holds NaN or infinity, so that no change can be "
            "measured by it; lorakit verify names all such tensors."
        )
    return found


def _check_shape(adapter: Adapter, module: str, model: Model) -> None:
    shape = model.shape(module)
    grown = module.endswith(FIRST_LAYERS)
    if known(adapter) and not grown and flat(adapter.shape) != flat(shape):
        raise AdapterError(
            f"expected a change of {list(shape)} as the weight in {model.source.name} is, found "
            f"{list(adapter.shape)}; the LoRA was made for another model"
        )


def _values(change: Tensor) -> Tensor:
    """Return the singular values of a matrix [m, n] in fp64, from its Gram matrix."""
    wide = change.double() if len(change) <= change.shape[1] else change.double().T
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return squares.clamp(min=0).sqrt().flip(0)


def _cost(lora: LoraFile, model: Model | None) -> Callable[[str], int]:
    """Return the bytes that a layer takes: factors in fp64, the matrix where one is made."""

    def cost(module: str) -> int:
        adapter = lora.adapters[module]
        rows, columns = flat(adapter.shape)
        dense = adapter.kind not in ("lora", "locon")
        matrix = (32 if dense else 0) + (16 if model is not None else 0)
        return 32 * (adapter.rank or 1) * (rows + columns) + matrix * rows * columns

    return cost


def _filled(group: Group, layers: Sequence[Layer], whole: float) -> Group:
    if not layers:
        return group
    energy = math.fsum(layer.energy for layer in layers)
    alive = [layer.effective_rank for layer in layers if layer.energy]
    beside = [(layer.energy, layer.weight) for layer in layers if layer.weight is not None]
    weights = math.hypot(*(weight for _, weight in beside))
    changes = math.sqrt(math.fsum(change for change, _ in beside))
    return replace(
        group,
        norm=math.sqrt(energy),
        share=energy / whole if whole else 0.0,
        effective_rank=math.fsum(alive) / len(alive) if alive else 0.0,
        dead=len(layers) - len(alive),
        relative=changes / weights if weights else None,
    )
