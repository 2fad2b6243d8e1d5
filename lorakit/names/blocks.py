"""Block ids: which block a module belongs to, and how users write sets of them."""

import math
import re
from collections.abc import Sequence

from lorakit.errors import SpecError
from lorakit.names.architectures import Architecture, component_of, is_text_encoder
from lorakit.names.presets import UserPresets, preset_weights

BASE, MIDDLE, OTHER = "BASE", "MID", "OTHER"
_LAYER = re.compile(r"(?<=[._])\d+(?=[._])")
_NUMBERED = re.compile(r"(?P<side>[A-Z]+)(?P<number>\d+)")
_NUMBER = re.compile(r"[+-]?\d*\.?\d+")


def block_ids(architecture: Architecture | None) -> tuple[str, ...]:
    """Return an architecture's block ids in order: BASE, IN00…, MID, OUT00…; none if unknown."""
    return () if architecture is None else architecture.blocks


def block_of(module: str, architecture: Architecture | None) -> str:
    """Return the block id of a module; every module has one.

    Text encoders are BASE, or what the architecture calls them. Modules that an architecture does
    not know are OTHER; those of an unknown one are B00, B01, … by the first number in their name.
    """
    if is_text_encoder(module):
        own = {} if architecture is None else architecture.text_blocks
        return own.get(component_of(module), BASE)
    if architecture is not None:
        return architecture.block(module)
    found = _LAYER.search(module)
    return OTHER if found is None else f"B{int(found[0]):02}"


def fits(vector: tuple[float, ...], architecture: Architecture) -> bool:
    """Tell whether a vector has as many values as the architecture has blocks, or short of them."""
    return len(vector) in {len(order) for order in _orders(architecture)}


def _orders(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """Return the lists of ids that a vector may follow: those with attention, and all."""
    short = (BASE, *architecture.attention)
    return (short, architecture.blocks) if architecture.attention else (architecture.blocks,)


def weights_of(
    text: str, architecture: Architecture | None, user_presets: UserPresets | None = None
) -> dict[str, float]:
    """Read a preset's name or a vector of weights.

    Raises:
        SpecError: the name is unknown, or the vector does not fit the architecture.
    """
    if _is_vector(text):
        return parse_weights(text, architecture)
    own = user_presets or {}
    if text in own:
        return _weights_from(own[text], text, architecture)
    return preset_weights(text, known_architecture(architecture, text), tuple(own))


def spelled_out(text: str, user_presets: UserPresets) -> str:
    """Return the vector that a preset of the user's own stands for; any other text as it is."""
    if text not in user_presets or _is_vector(text):
        return text
    return ",".join(repr(weight) for weight in user_presets[text])


def parse_weights(csv: str, architecture: Architecture | None) -> dict[str, float]:
    """Read a vector of weights: a value a block, or a value a block with attention.

    Blocks that a short vector does not name get 0, as in the web UI.

    Raises:
        SpecError: a value is no number, or there are too few or too many.
    """
    values = [value.strip() for value in csv.split(",")]
    if any(value[:1].upper() in ("R", "U", "X") for value in values):
        raise SpecError(f"'{csv}': R, U and X draw weights for plots; give numbers.")
    try:
        numbers = tuple(float(value) for value in values)
    except ValueError:
        raise SpecError(f"'{csv}': expected numbers with commas between them.") from None
    return _weights_from(numbers, csv, architecture)


def _weights_from(
    numbers: tuple[float, ...], text: str, architecture: Architecture | None
) -> dict[str, float]:
    known = known_architecture(architecture, text)
    if not all(math.isfinite(number) for number in numbers):
        raise SpecError(f"'{text}': expected finite weights.")
    orders = _orders(known)
    for order in orders:
        if len(numbers) == len(order):
            named = dict(zip(order, numbers, strict=True))
            return {block: named.get(block, 0.0) for block in known.blocks}
    counts = " or ".join(f"{len(order)} ({' '.join(order)})" for order in orders)
    raise SpecError(
        f"'{text}': expected as many weights for {known.title} as it has blocks, {counts}, found "
        f"{len(numbers)}."
    )


def parse_ids(text: str, architecture: Architecture | None) -> tuple[str, ...]:
    """Read block ids and ranges, `OUT03-OUT06,MID`, in the architecture's order.

    Raises:
        SpecError: an id is not one of the architecture's.
    """
    known = known_architecture(architecture, text)
    ids = known.blocks
    chosen: set[str] = set()
    for item in text.replace(",", " ").split():
        if item.upper() == BASE and BASE not in ids:
            chosen.update(known.text_blocks.values())
            continue
        first, dash, last = item.partition("-")
        places = [_index(end, ids, text) for end in (first, last if dash else first)]
        chosen.update(ids[min(places) : max(places) + 1])
    if not chosen:
        raise SpecError(f"'{text}': expected block ids such as OUT03-OUT06,MID; found none.")
    return tuple(block for block in ids if block in chosen)


def format_ids(blocks: Sequence[str]) -> str:
    """Write block ids as `parse_ids` reads them, numbers that follow each other as a range."""
    runs: list[list[str]] = []
    for block in blocks:
        if runs and _follows(runs[-1][-1], block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _follows(block: str, next_block: str) -> bool:
    one, other = _NUMBERED.fullmatch(block), _NUMBERED.fullmatch(next_block)
    if one is None or other is None:
        return False
    return one["side"] == other["side"] and int(one["number"]) + 1 == int(other["number"])


def _index(block: str, ids: tuple[str, ...], text: str) -> int:
    name = block.upper()
    if found := _NUMBERED.fullmatch(name):
        name = f"{found['side']}{int(found['number']):02}"
    name = MIDDLE if name == "M00" else name
    if name not in ids:
        raise SpecError(f"'{text}': {block} is no block here; the ids are {' '.join(ids)}.")
    return ids.index(name)


def _is_vector(text: str) -> bool:
    return "," in text or _NUMBER.fullmatch(text.strip()) is not None


def known_architecture(architecture: Architecture | None, text: str) -> Architecture:
    """Return the architecture.

    Raises:
        SpecError: it is not known, so that blocks have no ids.
    """
    if architecture is None:
        raise SpecError(f"'{text}': the LoRA's architecture is not known, so it has no block ids.")
    return architecture
