"""A layer of a model, under its names."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module's name in a kohya LoRA, and its place in the checkpoint."""

    name: str
    key: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
