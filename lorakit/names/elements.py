"""LoRA Block Weight's elemental rules: weights for parts of blocks."""

import math
import re
from dataclasses import dataclass
from functools import cache

from lorakit.errors import SpecError
from lorakit.names.architectures import Architecture
from lorakit.names.blocks import block_of, known_architecture, parse_ids
from lorakit.names.spelling import DENOISERS

PRESETS = {
    "ATTNDEEPON": "IN05-OUT05:attn:1",
    "ATTNDEEPOFF": "IN05-OUT05:attn:0",
    "PROJDEEPOFF": "IN05-OUT05:proj:0",
}
"""The web UI's named rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementRule:
    """A weight for the modules of some blocks whose names hold some element."""

    blocks: tuple[str, ...]
    elements: tuple[str, ...]
    negated: bool
    weight: float


def parse_elements(text: str, architecture: Architecture | None) -> tuple[ElementRule, ...]:
    """Read rules `BLOCKS:ELEMENTS:WEIGHT` with commas or lines between them.

    BLOCKS and ELEMENTS are lists with spaces between; blocks may be ranges; a leading NOT takes all
    others; empty means any. An element is a run of whole words of a module's name in the single
    file, `attn` for attn1 and attn2 too; a word that no such name holds, as `resnets`, is looked
    for in diffusers' names.

    Raises:
        SpecError: a rule has another form, or names a block or an element that is not there.

    Source: LoRA Block Weight, which also finds `to_` in to_k, and OUT1 in OUT10.
    """
    known = known_architecture(architecture, text)
    text = PRESETS.get(text.strip(), text)
    rules = [_rule(part, known) for part in re.split(r"[,\n]", text) if part.strip()]
    if not rules:
        raise SpecError(f"'{text}': expected rules such as IN05-OUT05:attn:0, found none.")
    return tuple(rules)


def _rule(text: str, architecture: Architecture) -> ElementRule:
    fields = [field.strip() for field in text.split(":")]
    if len(fields) != 3:
        raise SpecError(
            f"'{text.strip()}': expected BLOCKS:ELEMENTS:WEIGHT, as in IN05-OUT05:attn:0."
        )
    try:
        weight = float(fields[2])
    except ValueError:
        raise SpecError(f"'{text.strip()}': expected a number as the weight.") from None
    if not math.isfinite(weight):
        raise SpecError(f"'{text.strip()}': expected a finite weight.")
    ids = architecture.blocks
    others, names = _negated(fields[0])
    named = set(parse_ids(names, architecture)) if names else set(ids)
    negated, words = _negated(fields[1])
    elements = tuple(words.split())
    for element in elements:
        if architecture.modules and not _spoken(architecture, element):
            raise SpecError(
                f"'{text.strip()}': {element} is in no layer's name; try attn, ff, to_k."
            )
    return ElementRule(
        blocks=tuple(block for block in ids if (block in named) != others),
        elements=elements,
        negated=negated,
        weight=weight,
    )


def _negated(field: str) -> tuple[bool, str]:
    words = field.split()
    if words and words[0].upper() == "NOT":
        return True, " ".join(words[1:])
    return False, field


def element_weight(
    module: str,
    block_weight: float,
    rules: tuple[ElementRule, ...],
    architecture: Architecture | None,
) -> float:
    """Return a module's weight after the rules: the last that holds replaces the block's."""
    if not rules:
        return block_weight
    block = block_of(module, architecture)
    weights = [rule.weight for rule in rules if _holds(rule, module, block, architecture)]
    return weights[-1] if weights else block_weight


def _holds(rule: ElementRule, module: str, block: str, architecture: Architecture | None) -> bool:
    if block not in rule.blocks:
        return False
    if not rule.elements or architecture is None:
        return True
    if module in architecture.modules:
        found = any(module in _spoken(architecture, element) for element in rule.elements)
    else:
        found = any(_word(element).search(module) for element in rule.elements)
    return found != rule.negated


@cache
def _word(element: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|[._]){re.escape(element).replace('_', '[._]')}\d*(?:$|[._])")


@cache
def _spoken(architecture: Architecture, element: str) -> frozenset[str]:
    """Return the modules whose names hold an element."""
    holds = _word(element).search
    modules = architecture.modules.values()
    web = {n.module for n in modules if holds(n.original if n.component in DENOISERS else n.path)}
    return frozenset(web or {n.module for n in modules if holds(n.path)})
