"""PEFT's adapter_config.json: what it says of scales, and what we say in it."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterError, FileFormatError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

AlphaOf = Callable[[str, int], float | None]
"""(module path, rank) -> alpha, None where nothing says it."""

_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases on lora_B",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "modules_to_save": "whole modules (modules_to_save)",
    "layer_replication": "layer replication",
    "target_parameters": "expert parameters (target_parameters)",
    "trainable_token_indices": "trained tokens",
    "use_qalora": "QALoRA",
}


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
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise FileFormatError(f"{path}: expected peft_type LORA, found {kind}; use a LoRA adapter.")
    asked = [name for flag, name in _REFUSED.items() if config.get(flag)]
    if config.get("bias", "none") != "none":
        asked.append("trained biases")
    if str(config.get("init_lora_weights", "")).startswith(("pissa", "olora", "corda", "lora_ga")):
        asked.append(f"{config['init_lora_weights']}, which changed the base when it began")
    if asked:
        raise AdapterError(
            f"{path}: expected a plain LoRA, found {', '.join(asked)}; merge it with PEFT first."
        )
    return config


def alpha_from_config(config: Mapping[str, Any]) -> AlphaOf:
    """Return the alpha of each module as PEFT understands the configuration.

    The patterns are tried in their order and the first that matches the end of the module's path
    wins; with rsLoRA the scale is alpha / √rank, so alpha · √rank stands for it.

    Source: PEFT 0.21.2, `get_pattern_key`.
    """
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    default = config.get("lora_alpha")
    rooted = bool(config.get("use_rslora"))

    def alpha_of(path: str, rank: int) -> float | None:
        hits = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", path))
        alpha = next(hits, default)
        if alpha is None:
            return None
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


def format_config(ranks: Mapping[str, int]) -> str:
    """Write the configuration of an adapter whose scale is 1 everywhere.

    Args:
        ranks: module path -> rank.

    Paths in patterns are regular expressions to PEFT, and match ends: dots are escaped and every
    path that differs from the most frequent rank is named whole.
    """
    counts: dict[int, int] = {}
    for rank in ranks.values():
        counts[rank] = counts.get(rank, 0) + 1
    common = max(sorted(counts), key=lambda rank: counts[rank])
    pattern = {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != common}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
