"""The exact signed sum of LoRAs, a piece a module."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors, norm
from lorakit.lorafile import LoraFile
from lorakit.methods import linear
from lorakit.names.architectures import Architecture
from lorakit.names.unet import is_3x3
from lorakit.operations.pieces import Piece
from lorakit.operations.strength import Strength, strength_at

Stack = Sequence[tuple[LoraFile, "float | Strength"]]
Part = tuple[Adapter, float]


def parts_of(stack: Stack) -> dict[str, list[Part]]:
    """Collect each module's adapters with their strengths, modules in sorted order.

    A module that only some LoRAs have counts as zero in the others; a strength of zero leaves the
    part out. Parts are sorted by content, so that the order of the arguments changes no bit.

    Raises:
        AdapterError: two LoRAs disagree about the shape of a module.
    """
    modules: dict[str, list[Part]] = {}
    for lora, strength in sorted(stack, key=_content):
        for module, adapter in lora.adapters.items():
            at = strength_at(strength, lora, module)
            found = modules.setdefault(module, [])
            if found:
                _check_shape(module, found[0][0], adapter, lora)
            if at:
                found.append((adapter, at))
    return {module: modules[module] for module in sorted(modules)}


def _content(entry: tuple[LoraFile, float | Strength]) -> tuple[str, str]:
    lora, strength = entry
    return lora.sha256 or lora.name, repr(strength)


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
    shapes = [adapter.shape for adapter, _ in parts if known(adapter)]
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


def needs_base(parts: Sequence[Part]) -> bool:
    """Tell whether some ΔW depends on the weight that it changes."""
    return any(adapter.needs_base for adapter, _ in parts)


def total(parts: Sequence[Part], base: Tensor | None = None) -> Factors | Tensor:
    """Return Σ strength · ΔW of one module's adapters: factors, or dense where one has none.

    Args:
        parts: the adapters and their strengths.
        base: the weight [out, in · kh · kw] in fp32, where a part needs it.
    """
    changes = [(adapter.change(base), strength) for adapter, strength in parts]
    factors = [(change, s) for change, s in changes if isinstance(change, Factors)]
    if len(factors) == len(changes):
        return linear(factors)
    shape = shape_of(parts)
    sides = flat(shape) if shape is not None else tuple(changes[0][0].shape)
    whole = torch.zeros(sides, dtype=torch.float64)
    for change, strength in changes:
        if isinstance(change, Factors):
            whole.addmm_(change.up.double(), change.down.double(), alpha=strength)
        else:
            whole.add_(change.double().reshape(whole.shape), alpha=strength)
    return whole


def sum_piece(
    module: str,
    block: str,
    parts: Sequence[Part],
    base: Callable[[], Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Piece:
    """Make the piece Σ strength · ΔW of one module's adapters.

    Args:
        module: the canonical name.
        block: its block id.
        parts: the adapters and their strengths.
        base: reads the module's weight, where a part needs it.
        shape: of the weight; what the adapters say if left out.
    """
    read = base if needs_base(parts) else None

    def largest() -> float:
        weight = read() if read else None
        return max(abs(s) * size(adapter.change(weight)) for adapter, s in parts)

    ranks = [adapter.rank for adapter, _ in parts]
    shape = shape or with_kernel(module, shape_of(parts) or (0, 0))
    rows, columns = flat(shape)
    least = min(rows, columns)
    known = [rank for rank in ranks if rank is not None]
    dense = read is not None or len(known) < len(ranks) or is_dense(parts)
    rank = least if dense else sum(known)
    return Piece(
        module=module,
        block=block,
        shape=shape,
        truth=lambda: total(parts, read() if read else None),
        base=base,
        floor=largest if len(parts) > 1 else None,
        rank_before=max(known, default=None),
        rank_bound=min(rank, least),
        cost=40 * rows * columns if dense else 40 * (rows + columns) * rank,
    )


def with_kernel(module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a convolution whose adapter holds its kernel flat, as LoHa's do."""
    if len(shape) == 2 and is_3x3(module) and shape[1] % 9 == 0:
        return (shape[0], shape[1] // 9, 3, 3)
    return shape


def is_dense(parts: Sequence[Part]) -> bool:
    """Tell whether Σ strength · ΔW may have to be made as a whole matrix."""
    return any(adapter.kind not in ("lora", "locon") for adapter, _ in parts)


def size(change: Factors | Tensor) -> float:
    """Return ‖ΔW‖."""
    if isinstance(change, Factors):
        return norm(change)
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))
