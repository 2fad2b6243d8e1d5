"""PEFT's adapter_config.json: what it says of scales, and what we say in it."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterError, FileFormatError
from lorakit.linalg.rotations import Cayley
from lorakit.peftpatterns import Patterns
from lorakit.tensorfile.reading import parse_json, read_small

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

AlphaOf = Callable[[str, int], float | None]
"""(module path, rank) -> alpha, None where nothing says it."""

_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")
_REFUSED = {
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "layer_replication": "layer replication",
    "target_parameters": "expert parameters (target_parameters)",
    "trainable_token_indices": "trained tokens",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "an activated LoRA, which holds from some tokens on",
    "arrow_config": "Arrow, which chooses between LoRAs as it runs",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_MOST_TERMS = 100
"""Of Neumann's series: where it converges, PEFT's five are as good."""
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings of the inits that change the base before training."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read a PEFT folder's configuration.

    Raises:
        FileFormatError: it is not JSON, or not of a LoRA.
        AdapterError: it asks for something that a plain LoRA does not have.
    """
    path = folder / CONFIG
    raw = read_small(path)
    try:
        config = parse_json(raw)
    except ValueError as error:
        raise FileFormatError(f"{path}: expected JSON, found {error}; save it again.") from None
    kind = config.get("peft_type", "LORA") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or str(kind).upper() not in _TYPES:
        raise FileFormatError(
            f"{path}: expected peft_type {', '.join(_TYPES)}, found {str(kind)[:60]}; merge it "
            "with PEFT."
        )
    asked = [name for flag, name in _REFUSED.items() if config.get(flag)]
    begun = str(config.get("init_lora_weights", ""))
    if begun.lower().startswith(_CHANGED_BASE):
        asked.append(f"{begun[:60]}, which changed the base when it began")
    if asked:
        raise AdapterError(
            f"{path}: expected a plain LoRA, found {', '.join(asked)}; merge it with PEFT first."
        )
    return config


def cayley_from_config(config: Mapping[str, Any], name: str) -> Cayley | None:
    """Return how an OFT's numbers become rotations; None for other types.

    Args:
        config: as it was read.
        name: what errors call it.

    Raises:
        AdapterError: a setting is no number, or would take for ever.

    Source: PEFT 0.21.2, `OFTConfig` and its defaults.
    """
    if str(config.get("peft_type")).upper() != "OFT":
        return None
    terms, bound = config.get("num_cayley_neumann_terms", 5), config.get("eps", 6e-5)
    series, bounded = config.get("use_cayley_neumann", True), config.get("coft")
    if series and not (type(terms) is int and 0 <= terms <= _MOST_TERMS):
        raise AdapterError(
            f"{name}: expected a whole number up to {_MOST_TERMS} as num_cayley_neumann_terms, "
            f"found {_short(terms)}; save it again."
        )
    if bounded and not (type(bound) in (int, float) and 0 <= bound < 1e30):
        raise AdapterError(
            f"{name}: expected a positive number as eps, found {_short(bound)}; save it again."
        )
    return Cayley(terms=terms if series else None, bound=float(bound) if bounded else None)


def alpha_from_config(config: Mapping[str, Any], name: str) -> AlphaOf:
    """Return the alpha of each module as PEFT understands the configuration.

    For rank 0, a LoKr of whole matrices, it is the scale itself: PEFT divides by the configured
    rank also there.

    The patterns are tried in their order and the first that matches the end of the module's path
    wins; with rsLoRA the scale is alpha / √rank, so alpha · √rank stands for it.

    Args:
        config: as it was read.
        name: what errors call it.

    Raises:
        AdapterError: an alpha or a rank is no number, or a pattern cannot be tried; the function
            that is returned raises it too.

    Source: PEFT 0.21.2, `get_pattern_key`.
    """
    default = _alpha(config.get("lora_alpha", config.get("alpha")), name)
    rooted = bool(config.get("use_rslora"))
    alphas = _patterns(config, "alpha_pattern", _alpha, name)
    # Needed by a LoKr of whole matrices alone.
    ranks = cache(lambda: _patterns(config, "rank_pattern", _rank, name))

    def alpha_of(path: str, rank: int) -> float | None:
        try:
            alpha = alphas.value(path, default)
            if alpha is None:
                return None
            if not rank:
                return alpha / (ranks().value(path, _rank(config.get("r", 1), name)) or 1.0)
        except AdapterError as error:
            raise _named(error, f"{name}: {path[:60]}") from None
        return alpha * (math.sqrt(rank) if rooted else 1.0)

    return alpha_of


def _patterns(
    config: Mapping[str, Any],
    key: str,
    read: Callable[[Any, str], float | None],
    name: str,
) -> Patterns:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise AdapterError(f"{name}: expected an object as {key}, found {_short(table)}.")
    try:
        return Patterns.of({pattern: read(value, name) for pattern, value in table.items()})
    except AdapterError as error:
        raise _named(error, name) from None


def _named(error: AdapterError, name: str) -> AdapterError:
    """Put before an error which file it is of, unless it says so."""
    told = str(error)
    return error if told.endswith(".") else AdapterError(f"{name} {told}.")


def _alpha(value: Any, name: str) -> float | None:
    if value is None:
        return None
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if not fine:
        raise AdapterError(
            f"{name}: expected a finite number as alpha, found {_short(value)}; save it again."
        )
    return float(value)


def _rank(value: Any, name: str) -> float:
    if type(value) is not int or not 0 < value < 2**31:
        raise AdapterError(
            f"{name}: expected a positive whole number as rank, found {_short(value)}; save it "
            "again."
        )
    return float(value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def alpha_from_metadata(metadata: Mapping[str, str], name: str) -> AlphaOf:
    """Return the alpha that diffusers keeps in a file's header, by component.

    Args:
        metadata: the header's.
        name: what errors call the file.

    Raises:
        AdapterError: as `alpha_from_config`.

    Source: diffusers 0.42.1, `lora_adapter_metadata`: flat keys such as `unet.lora_alpha`.
    """
    try:
        flat = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        flat = error
    if not isinstance(flat, dict):
        raise AdapterError(
            f"{name}: expected a JSON object as lora_adapter_metadata, where the alphas are, found "
            f"{_short(flat)}; remove or repair that key with lorakit metadata."
        )
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    readers = {c: alpha_from_config(config, name) for c, config in configs.items()}

    def alpha_of(path: str, rank: int) -> float | None:
        component, _, rest = path.partition(".")
        return readers[component](rest, rank) if component in readers else None

    return alpha_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLayer:
    """What PEFT's configuration says of one layer."""

    rank: int
    alpha: float
    dora: bool = False
    bias: bool = False


def format_config(layers: Mapping[str, PeftLayer]) -> str:
    """Write the configuration of an adapter: rank and alpha of every layer.

    Args:
        layers: module path -> rank and alpha.

    Paths in patterns are regular expressions to PEFT, and match ends: dots are escaped and every
    path that differs from the most frequent value is named whole.
    """
    ranks = {path: layer.rank for path, layer in sorted(layers.items())}
    alphas = {path: layer.alpha for path, layer in sorted(layers.items())}
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(p)}": _plain(a) for p, a in alphas.items() if a != alpha},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(layer.dora for layer in layers.values()),
        **({"lora_bias": True} if any(layer.bias for layer in layers.values()) else {}),
    }
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _most_frequent(values: Iterable[float]) -> float:
    counts = Counter(values)
    return max(sorted(counts), key=lambda value: counts[value], default=1)


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
