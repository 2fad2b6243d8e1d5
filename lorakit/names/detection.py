"""Which architecture the names of a LoRA or of a checkpoint speak of."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import eq
from typing import TypeVar

from lorakit.names.architectures import Architecture, flat_name
from lorakit.names.families import ARCHITECTURES
from lorakit.names.spelling import TEXT_ENCODERS, Spelling

Item = TypeVar("Item")
_NUMBERED = re.compile(r"(?P<stack>[A-Za-z_]+?blocks|layers)_(?P<number>\d+)_")
_SHRUNKEN = 8
_HINTS = ("ss_base_model_version", "modelspec.architecture")


def detect(
    spelled: Mapping[str, Spelling],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> Architecture | None:
    """Return the architecture that knows the most modules, None where none knows the most of them.

    Where several know as many (SD 1 and 2 name their UNet alike), the prefixes of the text
    encoders, the metadata, whose names kohya writes, the dimensions of `proj_in`, and at last the
    widths decide, in this order.

    Args:
        spelled: raw name -> spelling.
        shapes: raw name -> shape of `down`.
        metadata: of the file.
    """
    denoiser = [at.path for at in spelled.values() if _of_denoiser(at)]
    likes = deep_enough(candidates(denoiser), denoiser)
    found = {at.path: shapes[raw] for raw, at in spelled.items() if raw in shapes}
    best = [
        architecture
        for architecture in most_known(spelled.values(), _of_denoiser, _knows, likes)
        if not architecture.common or all(_inputs(architecture, found, _is_part))
    ]
    if len(best) > 1:
        prefixes = {at.prefix for at in spelled.values() if at.prefix.startswith("lora_te")}
        hints = " ".join(metadata.get(key, "") for key in _HINTS).lower()
        hints += " sd_v2" if metadata.get("ss_v2") == "True" else ""
        best = preferred(
            best,
            lambda a: prefixes and prefixes <= {a.kohya_prefix(clip) for clip in a.clips},
            lambda a: any(m in hints for m in (a.base_model_version, a.modelspec, *a.marks)),
            lambda a: a.kohya_original or not _written_as_original(a, spelled.values()),
            lambda a: has_dimensions(a, found),
            lambda a: has_widths(a, found),
        )
    return best[0] if best else None


def candidates(paths: Iterable[str]) -> tuple[Architecture, ...]:
    """Return the architectures whose denoiser's paths begin as over half of these do.

    Args:
        paths: of the denoiser; where there are none, every architecture is one.
    """
    given = list(paths)
    if not given:
        return ARCHITECTURES
    return tuple(
        architecture
        for architecture in ARCHITECTURES
        if 2 * sum(path.startswith(architecture.roots) for path in given) > len(given)
    )


def deep_enough(among: Iterable[Architecture], paths: Iterable[str]) -> tuple[Architecture, ...]:
    """Return the architectures that have as many blocks as the paths count.

    A model of another family may share most of its names, and have more blocks.
    """
    deepest: dict[str, int] = {}
    for path in paths:
        if found := _NUMBERED.match(path.replace(".", "_")):
            stack, number = found["stack"], int(found["number"])
            deepest[stack] = max(deepest.get(stack, -1), number)
    return tuple(
        architecture
        for architecture in among
        if all(
            number <= _depths(architecture).get(stack, number) for stack, number in deepest.items()
        )
    )


@cache
def _depths(architecture: Architecture) -> dict[str, int]:
    """Return the last number of each stack of blocks, by the words before it."""
    deepest: dict[str, int] = {}
    for component, path in architecture.flat:
        found = _NUMBERED.match(path) if component == architecture.denoiser else None
        if found:
            stack = found["stack"]
            deepest[stack] = max(deepest.get(stack, -1), int(found["number"]))
    return deepest


def most_known(
    items: Iterable[Item],
    counted: Callable[[Item], bool],
    knows: Callable[[Architecture, Item], bool],
    among: Iterable[Architecture],
    *,
    share: float = 2 / 3,
) -> list[Architecture]:
    """Return the architectures that know the most, of those that know enough of what counts.

    Args:
        items: names, in whatever form `knows` takes.
        counted: tells a name of the denoiser; if there is none, all count.
        knows: tells whether an architecture has the name.
        among: the architectures to ask.
        share: of what counts that one must know more than.
    """
    everything = [(item, counted(item)) for item in items]
    if not any(counts for _, counts in everything):
        everything = [(item, True) for item, _ in everything]
    scores = {}
    for architecture in among:
        known = [counts for item, counts in everything if knows(architecture, item)]
        if sum(known) > share * sum(counts for _, counts in everything):
            scores[architecture] = len(known)
    most = max(scores.values(), default=0)
    return [architecture for architecture, score in scores.items() if score == most]


def preferred(
    candidates: list[Architecture], *tests: Callable[[Architecture], object]
) -> list[Architecture]:
    """Narrow candidates by each test in turn; a test that none passes is passed over."""
    for test in tests:
        candidates = [a for a in candidates if test(a)] or candidates
    return candidates


def has_dimensions(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether the weights that tell the architecture from its likes are as it has them."""
    return all(
        len(shape) == dimensions
        for path, shape in shapes.items()
        for word, dimensions in architecture.dimensions.items()
        if flat_name(path).endswith(f"_{word}")
    )


def has_widths(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether all weights that the architecture names have the inputs that it says."""
    found = _inputs(architecture, shapes, eq)
    return bool(found) and all(found)


def _inputs(
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    fits: Callable[[int, int], bool],
) -> list[bool]:
    """Tell of each weight whose inputs the architecture names whether these fit its own."""
    return [
        fits(shape[1], width)
        for path, shape in shapes.items()
        for word, width in architecture.widths.items()
        if len(shape) > 1 and flat_name(path).endswith(f"_{word}")
    ]


def _is_part(inputs: int, width: int) -> bool:
    """Tell whether inputs may be those of a shrunken model; no real one is so much smaller."""
    return inputs > 0 and (width % inputs == 0 or _SHRUNKEN * inputs <= width)


def _of_denoiser(at: Spelling) -> bool:
    return at.component not in TEXT_ENCODERS


def _knows(architecture: Architecture, at: Spelling) -> bool:
    return (architecture.component(at), flat_name(at.path)) in architecture.flat


def _written_as_original(architecture: Architecture, spelled: Iterable[Spelling]) -> bool:
    """Tell whether kohya's names follow the single file: those of SD 1 and 2 never do."""
    for at in spelled:
        module = architecture.flat.get((architecture.denoiser, flat_name(at.path)))
        if at.dialect == "kohya" and module is not None:
            name = architecture.modules.get(module)
            return name is None or flat_name(name.path) != flat_name(at.path)
    return False
