"""Merge, extract, resize and cut LoRAs: exact, streaming, fast.

The public names load on first use, so that importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lorakit.version import VERSION as __version__

if TYPE_CHECKING:
    from lorakit.compute import Compute
    from lorakit.linalg.ranks import RankRule
    from lorakit.lorafile import LoraFile, load_lora
    from lorakit.methods.method import Method
    from lorakit.operations.apply import apply
    from lorakit.operations.choice import Choice
    from lorakit.operations.compare import compare
    from lorakit.operations.compare_models import compare_models
    from lorakit.operations.convert import convert
    from lorakit.operations.cut_blocks import cut_blocks
    from lorakit.operations.edit_metadata import edit_metadata, metadata_hashes, read_metadata
    from lorakit.operations.extract import extract
    from lorakit.operations.inspect import inspect
    from lorakit.operations.merge import merge
    from lorakit.operations.resize import resize, yardsticks
    from lorakit.operations.strength import Strength
    from lorakit.operations.subtract import subtract
    from lorakit.report import Report
    from lorakit.saving import Output, save_lora, save_model
    from lorakit.tensorfile.source import TensorSource, open_source

_HOMES = {
    "Choice": "operations.choice",
    "Compute": "compute",
    "LoraFile": "lorafile",
    "Method": "methods.method",
    "Output": "saving",
    "RankRule": "linalg.ranks",
    "Report": "report",
    "Strength": "operations.strength",
    "TensorSource": "tensorfile.source",
    "apply": "operations.apply",
    "compare": "operations.compare",
    "compare_models": "operations.compare_models",
    "convert": "operations.convert",
    "cut_blocks": "operations.cut_blocks",
    "edit_metadata": "operations.edit_metadata",
    "extract": "operations.extract",
    "inspect": "operations.inspect",
    "load_lora": "lorafile",
    "merge": "operations.merge",
    "metadata_hashes": "operations.edit_metadata",
    "open_source": "tensorfile.source",
    "read_metadata": "operations.edit_metadata",
    "resize": "operations.resize",
    "save_lora": "saving",
    "save_model": "saving",
    "subtract": "operations.subtract",
    "yardsticks": "operations.resize",
}

__all__ = [
    "Choice",
    "Compute",
    "LoraFile",
    "Method",
    "Output",
    "RankRule",
    "Report",
    "Strength",
    "TensorSource",
    "__version__",
    "apply",
    "compare",
    "compare_models",
    "convert",
    "cut_blocks",
    "edit_metadata",
    "extract",
    "inspect",
    "load_lora",
    "merge",
    "metadata_hashes",
    "open_source",
    "read_metadata",
    "resize",
    "save_lora",
    "save_model",
    "subtract",
    "yardsticks",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakit' has no attribute '{name}'")
    return getattr(import_module(f"lorakit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
