"""How strongly a LoRA acts on each of its modules."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.lorafile import LoraFile
from lorakit.names.architectures import is_text_encoder
from lorakit.names.blocks import weights_of
from lorakit.names.elements import ElementRule, element_weight, parse_elements
from lorakit.names.specs import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """A LoRA's coefficients: any real numbers.

    Args:
        unet: on the UNet's or transformer's modules.
        te: on the text encoders' modules.
        blocks: block id -> weight, multiplied in; an id that is not named counts 1.
        elements: LoRA Block Weight's elemental rules, which replace the block's weight.
    """

    unet: float = 1.0
    te: float = 1.0
    blocks: Mapping[str, float] | None = None
    elements: tuple[ElementRule, ...] = ()


Stack = tuple[tuple[LoraFile, "float | Strength"], ...]


def strength_of(
    spec: LoraSpec, lora: LoraFile, presets: Mapping[str, tuple[float, ...]] | None = None
) -> Strength:
    """Resolve what the command line says of a LoRA for the architecture that the file has.

    Raises:
        SpecError: a preset, a vector or a rule does not fit the architecture.
    """
    unet = spec.strength if spec.unet is None else spec.unet
    te = spec.strength if spec.te is None else spec.te
    architecture = lora.blocks
    blocks = weights_of(spec.lbw, architecture, presets or {}) if spec.lbw else None
    elements = parse_elements(spec.lbwe, architecture) if spec.lbwe else ()
    return Strength(unet=unet, te=te, blocks=blocks, elements=elements)


def strength_at(strength: float | Strength, lora: LoraFile, module: str) -> float:
    """Return the coefficient of one module."""
    if not isinstance(strength, Strength):
        return float(strength)
    whole = strength.te if is_text_encoder(module) else strength.unet
    return whole * block_weight(
        lora, module, blocks=strength.blocks or {}, elements=strength.elements
    )


def size_of(strength: float | Strength) -> tuple[float, ...]:
    """Return what orders strengths by their sizes, alike for all multiples of them."""
    if not isinstance(strength, Strength):
        return abs(strength), abs(strength)
    blocks = strength.blocks or {}
    return abs(strength.unet), abs(strength.te), *(blocks[block] for block in sorted(blocks))


def block_weight(
    lora: LoraFile,
    module: str,
    *,
    blocks: Mapping[str, float],
    elements: tuple[ElementRule, ...] = (),
) -> float:
    """Return the weight of a module's block, 1 where nothing names it, after the rules."""
    weight = blocks.get(lora.block(module), 1.0)
    return element_weight(module, weight, elements, lora.blocks) if elements else weight
