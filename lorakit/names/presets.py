"""LoRA Block Weight's presets, resolved for each architecture, and the user's own."""

from collections.abc import Mapping

from lorakit.errors import SpecError
from lorakit.names.architectures import Architecture

UserPresets = Mapping[str, tuple[float, ...]]

_WHOLE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
_SIDES = {"INALL": "IN", "OUTALL": "OUT"}
NAMES = ("NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5")


def preset_weights(
    name: str, architecture: Architecture, own: tuple[str, ...] = ()
) -> dict[str, float]:
    """Return the weight of each block under a shipped preset.

    A transformer has no sides and no presets but NONE, ALL and ALL0.5.

    NONE, ALL and ALL0.5 hold for every block, INALL and OUTALL for every block of their side; the
    others name blocks with attention. BASE is 1 in all but NONE and ALL0.5.

    Args:
        name: as shipped.
        architecture: whose blocks.
        own: the names of the user's presets, for the message.

    Raises:
        SpecError: there is no such preset.

    Source: LoRA Block Weight, with each preset named by block instead of by place: its 17 values
    leave out OUT00-OUT02 of SDXL, 30 of the 70 transformer blocks.
    """
    if name in _WHOLE:
        return dict.fromkeys(architecture.blocks, _WHOLE[name])
    if name in _SIDES and architecture.presets:
        inside = tuple(block for block in architecture.blocks if block.startswith(_SIDES[name]))
    elif name in architecture.presets:
        inside = architecture.presets[name]
    else:
        names = ", ".join((*preset_names(architecture), *own))
        raise SpecError(f"'{name}' is no preset for {architecture.title}; there are {names}.")
    return {block: float(block == "BASE" or block in inside) for block in architecture.blocks}


def preset_names(architecture: Architecture) -> tuple[str, ...]:
    """Return the shipped presets that mean something for an architecture."""
    return NAMES if architecture.presets else tuple(name for name in NAMES if name in _WHOLE)


def parse_presets_file(text: str) -> dict[str, tuple[float, ...]]:
    """Read the web UI's lbwpresets.txt: a line `NAME:1,0,…` a preset; others are comments.

    A preset with R, U or X in it draws weights for plots and is left out.
    """
    found: dict[str, tuple[float, ...]] = {}
    for line in text.splitlines():
        name, colon, csv = line.strip().partition(":")
        if not colon or "#" in line:
            continue
        try:
            found[name.strip()] = tuple(float(value) for value in csv.split(","))
        except ValueError:
            continue
    return found
