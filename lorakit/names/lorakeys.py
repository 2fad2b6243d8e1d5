"""The keys of a LoRA file, grouped: which module, which role, which kind."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.names.architectures import Architecture
from lorakit.names.checkpoints import BIAS
from lorakit.names.dialects import BUNDLED, ParsedKey, parse_key, resolve

_SAVED = re.compile(
    r"(?P<raw>.*base_model\.model\..+?)(?P<base>\.base_layer)?\.(?P<what>weight|bias)"
)
"""PEFT's whole values beside its factors, and its copies of weights that it did not change."""
_COMMON_WORDS = ("dora", "glora", "tlora", "set")
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

    `modules` holds a module's spellings in sorted order: two where a file stores it twice. What
    changes a bias is a module of its own, called `….bias`. `carried` are the keys of textual
    inversions that come along, `unclaimed` those that nobody knows.
    """

    architecture: Architecture | None
    dialect: str
    modules: Mapping[str, tuple[ModuleKeys, ...]]
    carried: tuple[str, ...]
    unclaimed: tuple[str, ...]


def read_keys(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> LoraKeys:
    """Group the keys of a LoRA file by module.

    Args:
        shapes: key -> shape, as the header tells.
        metadata: the header's metadata, for hints that the keys leave open.
    """
    claimed = _parsed(shapes)
    parsed = {key: found for key, found in claimed.items() if found.kind != "copy"}
    spellings: dict[tuple[str, str], list[dict[str, str]]] = {}
    kinds: dict[tuple[str, str], set[str]] = {}
    for key, found in parsed.items():
        at = (found.raw, BIAS if found.kind == "bias" else "")
        _group(spellings.setdefault(at, []), found.role)[found.role] = key
        if found.role not in ("alpha", "scale"):
            kinds.setdefault(at, set()).add(found.kind)
    downs = {found.raw: shapes[key] for key, found in parsed.items() if found.role == "down"}
    resolution = resolve((raw for raw, _ in spellings), downs, metadata)
    modules: dict[str, tuple[ModuleKeys, ...]] = {}
    for raw, bias in sorted(spellings):
        module, kind = resolution.modules[raw] + bias, frozenset(kinds.get((raw, bias), {"lora"}))
        found_there = (ModuleKeys(raw=raw, kinds=kind, keys=k) for k in spellings[raw, bias])
        modules[module] = (*modules.get(module, ()), *found_there)
    carried = tuple(sorted(key for key in shapes if key.startswith(BUNDLED)))
    return LoraKeys(
        architecture=resolution.architecture,
        dialect=resolution.dialect,
        modules={module: modules[module] for module in sorted(modules)},
        carried=carried,
        unclaimed=tuple(sorted(shapes.keys() - claimed.keys() - set(carried))),
    )


def _parsed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ParsedKey]:
    """Take the keys apart; a plain `.weight` is IA3's where `.on_input` is beside it."""
    parsed = {key: found for key in sorted(shapes) if (found := parse_key(key)) is not None}
    parsed = {key: found for key, found in parsed.items() if found.kind != "embedding"}
    for found in [found for found in parsed.values() if found.role == "on_input"]:
        if f"{found.raw}.weight" in shapes:
            parsed[f"{found.raw}.weight"] = ParsedKey(raw=found.raw, role="weight", kind="ia3")
    if any("base_model.model." in key for key in parsed):
        parsed |= {key: found for key in shapes.keys() - parsed if (found := _saved(key))}
    return {key: parsed[key] for key in sorted(parsed)}


def _saved(key: str) -> ParsedKey | None:
    """Take apart the key of a whole value: of `modules_to_save`, or of a trained bias.

    PEFT keeps the weight of a layer with factors as `base_layer.weight`, unchanged: a copy.
    """
    found = _SAVED.fullmatch(key)
    if found is None or "lora_" in key:
        return None
    if found["what"] == "bias":
        return ParsedKey(raw=found["raw"], role="set_weight", kind="bias")
    kind = "copy" if found["base"] else "set"
    return ParsedKey(raw=found["raw"], role="set_weight", kind=kind)


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
    found = [key for key in parsed if key is not None and key.role not in ("alpha", "scale")]
    sure = any(key.kind not in _COMMON_WORDS for key in found)
    return sure or (bool(found) and None not in parsed)
