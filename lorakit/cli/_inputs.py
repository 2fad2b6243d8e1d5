"""From the arguments to LoRAs, stacks and models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import SpecError
from lorakit.names.presets import parse_presets_file
from lorakit.names.specs import LoraSpec, ModelSpec, format_lora, parse_lora, parse_model, parse_sum
from lorakit.names.tags import find_lora, parse_prompt, parse_tag

if TYPE_CHECKING:
    from lorakit.lorafile import LoraFile
    from lorakit.operations.strength import Strength
    from lorakit.tensorfile.source import TensorSource

UserPresets = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A stack as the operations take it, and what the arguments said."""

    specs: tuple[LoraSpec, ...]
    stack: tuple[tuple["LoraFile", "Strength"], ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that were read."""
        return tuple(Path(spec.path) for spec in self.specs)

    def recipe(self) -> list[dict[str, Any]]:
        """Return each input's name, hash and strengths."""
        return [
            {"lora": Path(spec.path).name, "sha256": lora.sha256, "strength": _strengths(spec)}
            for spec, (lora, _) in zip(self.specs, self.stack, strict=True)
        ]


def _strengths(spec: LoraSpec) -> str:
    return format_lora(spec).removeprefix(spec.path).removeprefix(":") or "1"


def read_presets(path: Path | None) -> UserPresets:
    """Read the user's own presets, the web UI's lbwpresets.txt."""
    if path is None:
        return {}
    return parse_presets_file(path.read_text(encoding="utf-8-sig"))


def lora_specs(
    texts: Sequence[str], *, prompt: str | None = None, lora_dir: Path | None = None
) -> tuple[LoraSpec, ...]:
    """Read LORA arguments, pasted tags and a prompt's tags.

    Raises:
        SpecError: one cannot be read, or a tag names no file.
    """
    folder = lora_dir or Path()

    def find(name: str) -> str:
        return find_lora(name, folder)

    specs = [
        parse_tag(text, find)
        if text.lstrip().startswith("<lora:")
        else parse_lora(text, exists=_is)
        for text in texts
    ]
    if prompt is not None:
        specs += parse_prompt(prompt, find)
    if not specs:
        raise SpecError("No LoRA was named; give LORA arguments, or --prompt with <lora:…> tags.")
    return tuple(specs)


def load_stack(
    specs: Sequence[LoraSpec],
    *,
    presets: UserPresets,
    header_only: bool = False,
    allow_unmatched: bool = False,
) -> Loaded:
    """Read the LoRAs of a stack, each file once, and resolve their strengths."""
    from lorakit.lorafile import load_lora
    from lorakit.operations.strength import strength_of

    files = {
        path: load_lora(path, header_only=header_only, allow_unmatched=allow_unmatched)
        for path in dict.fromkeys(spec.path for spec in specs)
    }
    stack = tuple(
        (files[spec.path], strength_of(spec, files[spec.path], presets)) for spec in specs
    )
    return Loaded(specs=tuple(specs), stack=stack)


def lora_sum(text: str) -> tuple[LoraSpec, ...]:
    """Read a sum of LoRAs, `A:0.5+B:-1`."""
    return parse_sum(text, exists=_is)


def model_spec(text: str) -> ModelSpec:
    """Read a MODEL argument."""
    return parse_model(text, exists=_is)


def open_expression(
    spec: ModelSpec,
    *,
    presets: UserPresets,
    header_only: bool = False,
    allow_unmatched: bool = False,
    device: str = "cpu",
) -> "TensorSource":
    """Open a model, with its LoRAs added on paper."""
    from lorakit.compute import Compute
    from lorakit.operations.apply import apply
    from lorakit.tensorfile.source import open_source

    base = open_source(spec.path)
    if not spec.loras:
        return base
    loaded = load_stack(
        spec.loras, presets=presets, header_only=header_only, allow_unmatched=allow_unmatched
    )
    compute = Compute(device=device)
    return apply(base, loaded.stack, allow_unmatched=allow_unmatched, compute=compute)[0]


def _is(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _is_tag(text: str) -> bool:
    return text.lstrip().startswith("<lora:")
