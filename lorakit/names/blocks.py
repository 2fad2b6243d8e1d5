"""Block ids: which block a module belongs to, and how users write sets of them."""

import math
import re

from lorakit.errors import SpecError
from lorakit.names.architectures import Architecture, is_text_encoder
from lorakit.names.presets import UserPresets, preset_weights

BASE, MIDDLE, OTHER = "BASE", "MID", "OTHER"
_NUMBERED = re.compile(r"(?P<side>[A-Z]+)(?P<number>\d+)")
_NUMBER = re.compile(r"[+-]?\d*\.?\d+")


def block_ids(architecture: Architecture | None) -> tuple[str, ...]:
    """Return an architecture's block ids in order: BASE, IN00…, MID, OUT00…; none if unknown."""
    return () if architecture is None else architecture.blocks


def block_of(module: str, architecture: Architecture | None) -> str:
    """Return the block id of a module; every module has one.

    Text encoders are BASE. Modules that an architecture does not know are OTHER.
    """
    if is_text_encoder(module):
        return BASE
    return OTHER if architecture is None else architecture.block(module)


def fits(vector: tuple[float, ...], architecture: Architecture) -> bool:
    """Tell whether a vector has as many values as the architecture has blocks, or short of them."""
    return len(vector) in (len(architecture.blocks), len(architecture.attention) + 1)


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
    ids, short = known.blocks, (BASE, *known.attention)
    if not all(math.isfinite(number) for number in numbers):
        raise SpecError(f"'{text}': expected finite weights.")
    for order in (short, ids):
        if len(numbers) == len(order):
            named = dict(zip(order, numbers, strict=True))
            return {block: named.get(block, 0.0) for block in ids}
    raise SpecError(
        f"'{text}': expected {len(short)} weights for {known.title} ({' '.join(short)}) or "
        f"{len(ids)} ({' '.join(ids)}), found {len(numbers)}."
    )


def parse_ids(text: str, architecture: Architecture | None) -> tuple[str, ...]:
    """Read block ids and ranges, `OUT03-OUT06,MID`, in the architecture's order.

    Raises:
        SpecError: an id is not one of the architecture's.
    """
    ids = known_architecture(architecture, text).blocks
    chosen: set[str] = set()
    for item in text.replace(",", " ").split():
        first, dash, last = item.partition("-")
        places = [_index(end, ids, text) for end in (first, last if dash else first)]
        chosen.update(ids[min(places) : max(places) + 1])
    if not chosen:
        raise SpecError(f"'{text}': expected block ids such as OUT03-OUT06,MID; found none.")
    return tuple(block for block in ids if block in chosen)


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
