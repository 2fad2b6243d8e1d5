"""The keys of a LoRA file, grouped: which module, which role, which kind."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.names.architectures import Architecture
from lorakit.names.dialects import parse_key, resolve

_COMMON_WORDS = ("dora", "glora", "tlora")
"""Kinds with suffixes that a checkpoint may have too, such as `.a1.weight`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleKeys:
    """The keys of one spelling of one module."""

    raw: str
    kinds: frozenset[str]
    keys: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraKeys:
    """What the keys of a LoRA file say.

    `modules` holds a module's spellings in sorted order: two where a file stores it twice.
    `unclaimed` are the keys that nobody knows.
    """

    architecture: Architecture | None
    dialect: str
    modules: Mapping[str, tuple[ModuleKeys, ...]]
    unclaimed: tuple[str, ...]


def read_keys(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> LoraKeys:
    """Group the keys of a LoRA file by module.

    Args:
        shapes: key -> shape, as the header tells.
        metadata: the header's metadata, for hints that the keys leave open.
    """
    parsed = {key: found for key in sorted(shapes) if (found := parse_key(key)) is not None}
    spellings: dict[str, list[dict[str, str]]] = {}
    kinds: dict[str, set[str]] = {}
    for key, found in parsed.items():
        _group(spellings.setdefault(found.raw, []), found.role)[found.role] = key
        if found.role != "alpha":
            kinds.setdefault(found.raw, set()).add(found.kind)
    downs = {found.raw: shapes[key] for key, found in parsed.items() if found.role == "down"}
    resolution = resolve(spellings, downs, metadata)
    modules: dict[str, tuple[ModuleKeys, ...]] = {}
    for raw in sorted(spellings):
        module, kind = resolution.modules[raw], frozenset(kinds.get(raw, {"lora"}))
        found_there = (ModuleKeys(raw=raw, kinds=kind, keys=keys) for keys in spellings[raw])
        modules[module] = (*modules.get(module, ()), *found_there)
    return LoraKeys(
        architecture=resolution.architecture,
        dialect=resolution.dialect,
        modules={module: modules[module] for module in sorted(modules)},
        unclaimed=tuple(sorted(shapes.keys() - parsed.keys())),
    )


def _group(spellings: list[dict[str, str]], role: str) -> dict[str, str]:
    """Return the first spelling that lacks a role: `.lora_A` and `.lora_down` may both be there."""
    for keys in spellings:
        if role not in keys:
            return keys
    spellings.append({})
    return spellings[-1]


def holds_lora(keys: Mapping[str, object]) -> bool:
    """Tell a LoRA from a checkpoint by its keys.

    A checkpoint of an unknown kind may have layers that are called like the parts of a GLoRA;
    such keys make a LoRA only where every key is some adapter's.
    """
    parsed = [parse_key(key) for key in keys]
    found = [key for key in parsed if key is not None and key.role != "alpha"]
    sure = any(key.kind not in _COMMON_WORDS for key in found)
    return sure or (bool(found) and None not in parsed)
