"""A stack of LoRAs, and the piece that each of its modules becomes."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Lora
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors, Framed
from lorakit.linalg.single import Term
from lorakit.linalg.tiles import Change, Tiled, size, summable
from lorakit.linalg.tiles import dense as made
from lorakit.lorafile import LoraFile
from lorakit.models import Model
from lorakit.names.architectures import Architecture
from lorakit.names.unet import is_3x3
from lorakit.operations.mixing import Mix, Part
from lorakit.operations.pieces import Piece
from lorakit.operations.strength import Strength, strength_at

Stack = Sequence[tuple[LoraFile, "float | Strength"]]
SUM = Mix()


def parts_of(stack: Stack, owners: Sequence[str] = ()) -> dict[str, list[Part]]:
    """Collect each module's adapters with their strengths, modules in sorted order.

    A module that only some LoRAs have counts as zero in the others; a strength of zero leaves the
    part out. Parts are sorted by content, so that the order of the arguments changes no bit.

    Args:
        stack: (LoRA, strength) pairs.
        owners: what names each one's masks; see `owners.owners_of`.

    Raises:
        AdapterError: two LoRAs disagree about the shape of a module.
    """
    modules: dict[str, list[Part]] = {}
    names = owners or [""] * len(stack)
    entries = [(*entry, owner) for entry, owner in zip(stack, names, strict=True)]
    for lora, strength, owner in sorted(entries, key=_content):
        for module, adapter in lora.adapters.items():
            at = strength_at(strength, lora, module)
            found = modules.setdefault(module, [])
            if found:
                _check_shape(module, found[0].adapter, adapter, lora)
            if at:
                found.append(Part(adapter=adapter, strength=at, owner=owner))
    return {module: modules[module] for module in sorted(modules)}


def _content(entry: tuple[LoraFile, float | Strength, str]) -> tuple[str, str]:
    lora, strength, owner = entry
    return owner or lora.sha256 or lora.name, repr(strength)


def _check_shape(module: str, first: Adapter, adapter: Adapter, lora: LoraFile) -> None:
    if known(first) and known(adapter) and flat(first.shape) != flat(adapter.shape):
        raise AdapterError(
            f"{lora.name}: {module} expected a change of {list(first.shape)} as in the other "
            f"LoRAs, found {list(adapter.shape)}; these LoRAs are for different models."
        )


def known(adapter: Adapter) -> bool:
    """Tell whether an adapter's own tensors say the shape of the weight; those of OFT do not."""
    return 0 not in adapter.shape


def shape_of(parts: Sequence[Part]) -> tuple[int, ...] | None:
    """Return the shape that the adapters of one module agree on, None where none says it."""
    shapes = [part.adapter.shape for part in parts if known(part.adapter)]
    return max(shapes, key=len) if shapes else None


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [out, in · kh · kw]: a 1x1 convolution is a linear layer, a bias one column."""
    return shape[0], math.prod(shape[1:])


def unclaimed(stack: Stack) -> tuple[str, ...]:
    """Return the tensors that nobody knew and that were left out on request, with their files."""
    files = {id(lora): lora for lora, _ in stack}
    return tuple(f"{lora.name}: {key}" for lora in files.values() for key in lora.unclaimed)


def architecture_of(stack: Stack) -> Architecture | None:
    """Return the architecture that the LoRAs share.

    Raises:
        AdapterError: they are for different architectures.
    """
    known = [(lora, lora.architecture) for lora, _ in stack if lora.architecture is not None]
    for lora, architecture in known[1:]:
        first = known[0][1]
        if architecture is not None and first is not None and architecture.kin != first.kin:
            raise AdapterError(
                f"{lora.name}: expected a LoRA for {first.title} as {known[0][0].name} is, found "
                f"one for {architecture.title}; only LoRAs of one architecture add up."
            )
    return known[0][1] if known else None


def check_architecture(model: Model, stack: Stack) -> None:
    """Check that a model is of the architecture that the LoRAs are for.

    Raises:
        AdapterError: it is of another one, or the LoRAs are of several.
    """
    ours, theirs = model.index.architecture, architecture_of(stack)
    if ours is not None and theirs is not None and ours.kin != theirs.kin:
        raise AdapterError(
            f"{model.source.name}: expected a model for {theirs.title}, as {stack[0][0].name} "
            f"needs, found {ours.title}; choose a model of the LoRA's architecture."
        )


def needs_base(parts: Sequence[Part]) -> bool:
    """Tell whether some ΔW depends on the weight that it changes."""
    return any(part.adapter.needs_base for part in parts)


def sum_piece(
    module: str,
    block: str,
    parts: Sequence[Part],
    base: Callable[[], Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
    mix: Mix = SUM,
) -> Piece:
    """Make the piece that one module's adapters become.

    Args:
        module: the canonical name.
        block: its block id.
        parts: the adapters and their strengths.
        base: reads the module's weight, where a part needs it.
        shape: of the weight; what the adapters say if left out.
        mix: how they are combined; the exact sum if left out.
    """
    read = base if needs_base(parts) else None

    def largest(enough: float) -> float:
        factor = mix.factor(parts)
        bound = factor * max(abs(p.strength) * _bound(p.adapter) for p in parts)
        if bound < enough:
            return bound
        weight = read() if read else None
        return factor * max(abs(p.strength) * size(p.adapter.change(weight)) for p in parts)

    ranks = [part.adapter.rank for part in parts]
    shape = shape or with_kernel(module, shape_of(parts) or (0, 0))
    conv = math.prod(shape[2:]) > 1
    rows, columns = flat(shape)
    least = min(rows, columns)
    known = [rank for rank in ranks if rank is not None]
    unranked = read is not None or len(known) < len(ranks) or is_dense(parts)
    dense = unranked or mix.dense
    rank = least if unranked else sum(known)
    return Piece(
        module=module,
        block=block,
        shape=shape,
        truth=lambda: _untiled(mix.of(module, parts, read() if read else None, conv=conv)),
        terms=_narrow(parts) if mix.method.plain else None,
        base=base,
        floor=largest if len(parts) > 1 else None,
        rank_before=max(known, default=None),
        rank_bound=min(rank, least),
        capped=mix.dense and not unranked,
        cost=40 * rows * columns if dense else 40 * (rows + columns) * rank,
    )


def _narrow(parts: Sequence[Part]) -> tuple[Term, ...] | None:
    """Return the terms of Σ strength · ΔW; None where one is not a product of narrow factors."""
    loras = [(p.adapter, p.strength) for p in parts if isinstance(p.adapter, Lora)]
    if len(loras) < len(parts) or not all(lora.narrow for lora, _ in loras):
        return None
    return tuple(
        Term(up=lora.up.flatten(1), down=lora.down.flatten(1), factor=lora.scale * strength)
        for lora, strength in loras
    )


def _bound(adapter: Adapter) -> float:
    """Return what ‖ΔW‖ is at the most, where the tensors tell it at once."""
    if not isinstance(adapter, Lora) or adapter.mid is not None:
        return math.inf
    largest = [max(map(abs, _extremes(side))) for side in (adapter.up, adapter.down)]
    numbers = adapter.up.numel() * adapter.down.numel()
    return abs(adapter.scale) * math.sqrt(numbers) * math.prod(largest)


def _extremes(tensor: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(summable(tensor))
    return float(low), float(high)


def _untiled(change: Change) -> Factors | Framed | Tensor:
    return made(change) if isinstance(change, Tiled) else change


def whole(change: Change) -> Factors | Tensor:
    """Return a ΔW as factors, or as one matrix where it is made by tiles."""
    if isinstance(change, Framed):
        return change.factors()
    return made(change) if isinstance(change, Tiled) else change


def with_kernel(module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a convolution whose adapter holds its kernel flat, as LoHa's do."""
    if len(shape) == 2 and is_3x3(module) and shape[1] % 9 == 0:
        return (shape[0], shape[1] // 9, 3, 3)
    return shape


def is_dense(parts: Sequence[Part]) -> bool:
    """Tell whether Σ strength · ΔW may have to be made as a whole matrix."""
    return any(part.adapter.kind not in ("lora", "locon") for part in parts)
