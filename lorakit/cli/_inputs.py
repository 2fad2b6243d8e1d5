"""From the arguments to LoRAs, stacks and models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import FileFormatError, SpecError
from lorakit.names.blocks import spelled_out
from lorakit.names.presets import parse_presets_file
from lorakit.names.specs import LoraSpec, ModelSpec, format_lora, parse_lora, parse_model, parse_sum
from lorakit.names.tags import find_lora, parse_prompt, parse_tag
from lorakit.tensorfile.reading import read_small

if TYPE_CHECKING:
    from lorakit.lorafile import LoraFile
    from lorakit.operations.strength import Strength
    from lorakit.tensorfile.source import TensorSource

UserPresets = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A stack as the operations take it, and what the arguments said, presets spelled out."""

    specs: tuple[LoraSpec, ...]
    stack: tuple[tuple["LoraFile", "Strength"], ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that were read."""
        return tuple(Path(spec.path) for spec in self.specs)

    def recipe(self) -> list[dict[str, Any]]:
        """Return each input's name, hashes and strengths; see docs/formats.md."""
        return [
            {
                "lora": name_of(spec.path),
                "sha256": lora.sha256,
                "header": header_of(spec.path),
                "strength": _strengths(spec),
            }
            for spec, (lora, _) in zip(self.specs, self.stack, strict=True)
        ]


def _strengths(spec: LoraSpec) -> str:
    return format_lora(spec).removeprefix(spec.path).removeprefix(":") or "1"


def name_of(path: str | Path) -> str:
    """Return what a recipe calls a file or folder: its name without the folders above it."""
    name = Path(path).name
    return Path(path).resolve().name if name in ("", "..") else name


def open_stored(path: str | Path) -> "TensorSource":
    """Open a LoRA or a model as it is stored."""
    from lorakit.peftfolder import is_peft_folder, open_peft
    from lorakit.tensorfile.source import open_source

    folder = Path(path)
    return open_peft(folder)[0] if folder.is_dir() and is_peft_folder(folder) else open_source(path)


def header_of(path: str | Path) -> str:
    """Return a hash of what stands beside a LoRA's or model's tensors: names, metadata, alphas."""
    from lorakit.peftconfig import CONFIG
    from lorakit.tensorfile.fingerprint import header_hash

    configs = sorted((*Path(path).glob(CONFIG), *Path(path).glob(f"*/{CONFIG}")))
    texts = {
        file.relative_to(path).as_posix(): read_small(file).decode(errors="replace")
        for file in configs
    }
    return header_hash(open_stored(path), texts)


def model_record(path: str | Path) -> dict[str, Any]:
    """Return how a recipe names a model, which is too large to be hashed whole."""
    from lorakit.tensorfile.fingerprint import sample_hash

    source = open_stored(path)
    nbytes = sum(spec.nbytes for spec in source.specs.values())
    sample, header = sample_hash(source), header_of(path)
    return {"model": name_of(path), "bytes": nbytes, "sample": sample, "header": header}


def side_record(model: str | Path | None, loaded: Loaded) -> dict[str, Any]:
    """Return how a recipe names LoRAs, and the model that they are on."""
    loras = {"loras": loaded.recipe()}
    return loras if model is None else {**model_record(model), **loras}


def check_there(*paths: str | Path) -> None:
    """Check that there is something, before torch is imported: a mistyped name is said at once.

    Raises:
        FileFormatError: there is nothing.
    """
    from lorakit.tensorfile.reading import reading

    for path in map(Path, paths):
        with reading(path):
            path.stat()


def read_presets(path: Path | None) -> UserPresets:
    """Read the user's own presets, the web UI's lbwpresets.txt.

    Raises:
        FileFormatError: it is no file of text.
    """
    if path is None:
        return {}
    raw = read_small(path)
    try:
        return parse_presets_file(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise FileFormatError(
            f"{path}: expected presets as UTF-8, found other bytes; save the file as UTF-8."
        ) from None


def lora_specs(
    texts: Sequence[str], *, prompt: str | None = None, folders: Sequence[Path] = ()
) -> tuple[LoraSpec, ...]:
    """Read LORA arguments, pasted tags and a prompt's tags.

    Raises:
        SpecError: one cannot be read, or a tag names no file.
        FileFormatError: there is no file.
    """

    def find(name: str) -> str:
        return find_lora(name, *(folders or (Path(),)))

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
    check_there(*(spec.path for spec in specs))
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
        path: load_lora(path, header_only=header_only, allow_unmatched=allow_unmatched, mapped=True)
        for path in dict.fromkeys(spec.path for spec in specs)
    }
    stack = tuple(
        (files[spec.path], strength_of(spec, files[spec.path], presets)) for spec in specs
    )
    # The user's presets are on this machine only: a recipe holds what they stand for.
    plain = (
        replace(spec, lbw=spelled_out(spec.lbw, presets)) if spec.lbw else spec for spec in specs
    )
    return Loaded(specs=tuple(plain), stack=stack)


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
) -> "tuple[TensorSource, Loaded]":
    """Open a model, with its LoRAs added on paper; return these LoRAs too."""
    check_there(spec.path)
    from lorakit.compute import Compute
    from lorakit.operations.apply import apply
    from lorakit.tensorfile.source import open_source

    base = open_source(spec.path)
    if not spec.loras:
        return base, Loaded(specs=(), stack=())
    loaded = load_stack(
        spec.loras, presets=presets, header_only=header_only, allow_unmatched=allow_unmatched
    )
    compute = Compute(device=device)
    applied, _ = apply(base, loaded.stack, allow_unmatched=allow_unmatched, compute=compute)
    return applied, loaded


def _is(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _is_tag(text: str) -> bool:
    return text.lstrip().startswith("<lora:")
