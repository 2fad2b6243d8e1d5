"""What is wrong with a LoRA, in sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorakit.adapters import Lora
from lorakit.compute import Compute
from lorakit.lorafile import LoraFile
from lorakit.names.checkpoints import BIAS
from lorakit.names.lorakeys import read_keys
from lorakit.operations.repair import weak_blocks
from lorakit.peftfolder import is_peft_folder, open_peft
from lorakit.report import name_some
from lorakit.tensorfile.claims import not_finite
from lorakit.tensorfile.hashes import MODEL_HASH
from lorakit.tensorfile.source import TensorSource, open_source

_WITH_ALPHA = ("kohya", "kohya-diffusers")
"""Dialects whose trainers always write alpha."""


def faults(
    lora: LoraFile, *, dead: Sequence[str], odd: Sequence[str], large: Sequence[str] = ()
) -> tuple[str, ...]:
    """Say what is wrong with a LoRA's values, scales and hash, and what mends it.

    Args:
        lora: the LoRA, without the layers in `odd`.
        dead: layers that change nothing.
        odd: layers that hold NaN or infinity.
        large: layers that change more than the model's weight, ‖ΔW‖ > ‖W‖.

    Source: `lorakit convert --repair`, which mends all but NaN.
    """
    said = []
    if odd:
        said.append(
            f"{_layers(odd, 'holds', 'hold')} NaN or infinity ({name_some(odd)}); the training "
            "diverged, or the file is broken."
        )
    if dead:
        said.append(
            f"{_layers(dead, 'changes', 'change')} nothing ({name_some(dead)}); lorakit convert "
            "--repair leaves out what does not."
        )
    if large:
        said.append(
            f"{_layers(large, 'changes', 'change')} more than the whole weight, ‖ΔW‖ > ‖W‖ "
            f"({name_some(large)}); the training diverged, or alpha is wrong."
        )
    said += _weak(weak_blocks(lora))
    unsaid = [m for m, a in lora.adapters.items() if isinstance(a, Lora) and not a.has_alpha]
    if unsaid and lora.dialect in _WITH_ALPHA:
        said.append(
            f"{_layers(unsaid, 'has', 'have')} no alpha, so that readers take the rank; lorakit "
            "convert --repair writes it."
        )
    stored = lora.metadata.get(MODEL_HASH)
    if stored and lora.sha256 and stored.lower() != lora.sha256:
        said.append(
            f"{MODEL_HASH} is of other tensors than these; lorakit metadata hash --in-place mends "
            "it."
        )
    return tuple(said)


def _weak(weak: Mapping[str, int]) -> list[str]:
    """Say of which fused layers alpha is that of one part, by how many parts they have."""
    found = []
    for parts in sorted(dict.fromkeys(weak.values())):
        modules = [module for module, count in weak.items() if count == parts]
        found.append(
            f"{_layers(modules, 'has', 'have')} the alpha of one of {parts} parts and so 1/{parts} "
            f"of the strength ({name_some(modules)}); lorakit convert --repair multiplies it."
        )
    return found


def _layers(modules: Sequence[str], one: str, many: str) -> str:
    return f"1 layer {one}" if len(modules) == 1 else f"{len(modules)} layers {many}"


def odd_modules(place: Path) -> tuple[str, ...]:
    """Return the modules of a LoRA that hold NaN or infinity.

    Raises:
        FileFormatError: the file cannot be read whole.

    Cost: one pass over the data.
    """
    peft = place.is_dir() and is_peft_folder(place)
    source: TensorSource = open_peft(place)[0] if peft else open_source(place)
    keys = read_keys({key: spec.shape for key, spec in source.specs.items()}, source.metadata)
    broken = frozenset(not_finite(source, compute=Compute.of(device="cpu")))
    odd = [
        module
        for module, spellings in keys.modules.items()
        if any(not broken.isdisjoint(spelling.keys.values()) for spelling in spellings)
    ]
    # A bias beside factors takes their scale, so that it goes with them.
    return tuple(m for m in keys.modules if m in odd or m.removesuffix(BIAS) in odd)
