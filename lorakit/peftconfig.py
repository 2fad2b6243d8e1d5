"""PEFT's adapter_config.json: what it says of scales, and what we say in it."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterError, FileFormatError
from lorakit.linalg.rotations import Cayley

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
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings of the inits that change the base before training."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read a PEFT folder's configuration.

    Raises:
        FileFormatError: it is not JSON, or not of a LoRA.
        AdapterError: it asks for something that a plain LoRA does not have.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: expected JSON, found {error}; save it again.") from None
    kind = config.get("peft_type", "LORA") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or str(kind).upper() not in _TYPES:
        raise FileFormatError(
            f"{path}: expected peft_type {', '.join(_TYPES)}, found {kind}; merge it with PEFT."
        )
    asked = [name for flag, name in _REFUSED.items() if config.get(flag)]
    if str(config.get("init_lora_weights", "")).lower().startswith(_CHANGED_BASE):
        asked.append(f"{config['init_lora_weights']}, which changed the base when it began")
    if asked:
        raise AdapterError(
            f"{path}: expected a plain LoRA, found {', '.join(asked)}; merge it with PEFT first."
        )
    return config


def cayley_from_config(config: Mapping[str, Any]) -> Cayley | None:
    """Return how an OFT's numbers become rotations; None for other types.

    Source: PEFT 0.21.2, `OFTConfig` and its defaults.
    """
    if str(config.get("peft_type")).upper() != "OFT":
        return None
    terms = config.get("num_cayley_neumann_terms", 5)
    return Cayley(
        terms=int(terms) if config.get("use_cayley_neumann", True) else None,
        bound=float(config.get("eps", 6e-5)) if config.get("coft") else None,
    )


def alpha_from_config(config: Mapping[str, Any]) -> AlphaOf:
    """Return the alpha of each module as PEFT understands the configuration.

    For rank 0, a LoKr of whole matrices, it is the scale itself: PEFT divides by the configured
    rank also there.

    The patterns are tried in their order and the first that matches the end of the module's path
    wins; with rsLoRA the scale is alpha / √rank, so alpha · √rank stands for it.

    Source: PEFT 0.21.2, `get_pattern_key`.
    """
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    default = config.get("lora_alpha", config.get("alpha"))
    rooted = bool(config.get("use_rslora"))

    ranks: Mapping[str, Any] = config.get("rank_pattern") or {}

    def matching(path: str, patterns: Mapping[str, Any], default: Any) -> Any:
        hits = (value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", path))
        return next(hits, default)

    def alpha_of(path: str, rank: int) -> float | None:
        alpha = matching(path, patterns, default)
        if alpha is None:
            return None
        if not rank:
            return float(alpha) / float(matching(path, ranks, config.get("r", 1)))
        return float(alpha) * (math.sqrt(rank) if rooted else 1.0)

    return alpha_of


def alpha_from_metadata(metadata: Mapping[str, str]) -> AlphaOf:
    """Return the alpha that diffusers keeps in a file's header, by component.

    Source: diffusers 0.42.1, `lora_adapter_metadata`: flat keys such as `unet.lora_alpha`.
    """
    try:
        flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        flat = {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    readers = {component: alpha_from_config(config) for component, config in configs.items()}

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
    }
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _most_frequent(values: Iterable[float]) -> float:
    counts = Counter(values)
    return max(sorted(counts), key=lambda value: counts[value], default=1)


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
