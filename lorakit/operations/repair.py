"""Known faults of other tools' files, found and mended."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Lora
from lorakit.linalg.factored import Factors
from lorakit.lorafile import LoraFile
from lorakit.names.architectures import Part
from lorakit.report import name_some
from lorakit.tensorfile.hashes import LEGACY_HASH, MODEL_HASH

_WITH_ALPHA = ("kohya", "kohya-diffusers")


def repaired(lora: LoraFile) -> tuple[LoraFile, tuple[str, ...]]:
    """Return a LoRA without the faults that lorakit knows, and a sentence for each that it had.

    - alpha missing beside `lora_up` and `lora_down`: it is the rank, and is written.
    - `split_qkv`: q, k and v trained apart and stored in blocks, at the alpha of one of them, so
      that they run at a third of their strength; alpha is multiplied.
    - layers that change nothing: left out.
    - hashes of other bytes than these: made anew.

    Source: sd-scripts issue 2204 for `split_qkv`.
    """
    adapters, weak = _without_weak_blocks(lora)
    alive = {module: adapter for module, adapter in adapters.items() if not _is_dead(adapter)}
    dead = sorted(adapters.keys() - alive.keys())
    notes = [
        f"{module}: alpha was that of one part, so it ran at 1/{parts} of its strength; multiplied."
        for module, parts in weak.items()
    ]
    if dead:
        notes.append(f"{len(dead)} layers that change nothing were left out: {name_some(dead)}.")
    unsaid = [module for module, a in alive.items() if isinstance(a, Lora) and not a.has_alpha]
    if unsaid and lora.dialect in _WITH_ALPHA:
        notes.append(
            f"{len(unsaid)} layers had no alpha; the rank, which readers take, is written."
        )
    stored = lora.metadata.get(MODEL_HASH)
    if stored and lora.sha256 and stored != lora.sha256:
        notes.append(f"{MODEL_HASH} and {LEGACY_HASH} were of other bytes; they are made anew.")
    return replace(lora, adapters=alive, sha256=""), tuple(notes)


def weak_blocks(lora: LoraFile) -> Mapping[str, int]:
    """Return the fused layers whose alpha is that of one part, and how many parts each has."""
    return _without_weak_blocks(lora)[1]


def _without_weak_blocks(lora: LoraFile) -> tuple[Mapping[str, Adapter], Mapping[str, int]]:
    if lora.architecture is None:
        return lora.adapters, {}
    fused = lora.architecture.fused
    usual = Counter(
        (adapter.rank, adapter.alpha)
        for module, adapter in lora.adapters.items()
        if isinstance(adapter, Lora) and module not in fused
    )
    adapters = dict(lora.adapters)
    weak: dict[str, int] = {}
    for module, adapter in lora.adapters.items():
        parts = len(fused.get(module, ()))
        if parts and isinstance(adapter, Lora) and _stands_in_blocks(adapter, fused[module]):
            rank = adapter.rank // parts
            if (rank, adapter.alpha) in usual:
                adapters[module] = replace(adapter, alpha=adapter.alpha * parts)
                weak[module] = parts
    return adapters, weak


def _stands_in_blocks(adapter: Lora, members: tuple[tuple[str, Part], ...]) -> bool:
    """Tell whether each part of a fused `up` has directions of its own, equally many."""
    of = members[0][1][2]
    unit, left = divmod(adapter.shape[0], of)
    if left or adapter.rank % len(members) or adapter.mid is not None:
        return False
    ranks = [adapter.rows(start * unit, stop * unit).rank for _, (start, stop, _) in members]
    return set(ranks) == {adapter.rank // len(members)}


def _is_dead(adapter: Adapter) -> bool:
    if adapter.needs_base:
        return False
    change = adapter.change()
    if isinstance(change, Factors):
        return _is_zero(change.up) or _is_zero(change.down)
    return _is_zero(change)


def _is_zero(tensor: Tensor) -> bool:
    return not bool(torch.count_nonzero(tensor))
