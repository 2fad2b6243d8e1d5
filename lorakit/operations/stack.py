"""The exact signed sum of LoRAs, a piece a module."""

import math
from collections.abc import Sequence

from lorakit.adapters import Adapter
from lorakit.errors import AdapterError
from lorakit.linalg.factored import Factors, norm
from lorakit.lorafile import LoraFile
from lorakit.methods import linear
from lorakit.names.architectures import Architecture
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
    if flat(first.shape) != flat(adapter.shape):
        raise AdapterError(
            f"{lora.name}: {module} expected a change of {list(first.shape)} as in the other "
            f"LoRAs, found {list(adapter.shape)}; these LoRAs are for different models."
        )


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [out, in · kh · kw]: a 1x1 convolution is a linear layer."""
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
        if architecture is not None and first is not None and architecture.id != first.id:
            raise AdapterError(
                f"{lora.name}: expected a LoRA for {first.title} as {known[0][0].name} is, found "
                f"one for {architecture.title}; only LoRAs of one architecture add up."
            )
    return known[0][1] if known else None


def total(parts: Sequence[Part]) -> Factors:
    """Return Σ strength · ΔW of one module's adapters, as factors."""
    return linear([(adapter.factors(), strength) for adapter, strength in parts])


def sum_piece(module: str, block: str, parts: Sequence[Part]) -> Piece:
    """Make the piece Σ strength · ΔW of one module's adapters."""

    def largest() -> float:
        return max(abs(strength) * norm(adapter.factors()) for adapter, strength in parts)

    rank = sum(adapter.rank for adapter, _ in parts)
    shape = max((adapter.shape for adapter, _ in parts), key=len)
    return Piece(
        module=module,
        block=block,
        shape=shape,
        truth=lambda: total(parts),
        floor=largest if len(parts) > 1 else None,
        rank_before=max(adapter.rank for adapter, _ in parts),
        rank_bound=min(rank, *flat(shape)),
        cost=40 * sum(flat(shape)) * rank,
    )
