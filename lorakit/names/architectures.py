"""What an architecture is: its modules under both of their names, and its blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from lorakit.names.spelling import DENOISERS, TEXT_ENCODERS, spelling_of

Part = tuple[int, int, int]
"""(start, stop, of): rows [n · start // of, n · stop // of] of a tensor with n rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleName:
    """One module: its canonical name, and its place in the original single file.

    Args:
        module: component and diffusers path, `unet.mid_block.attentions.0.proj_in`.
        original: the path in the single file, without the component's prefix.
        part: the rows of a tensor that holds several modules.
        transpose: whether the single file holds the transposed weight.
        parameter: what the tensor's key adds to `original`.
    """

    module: str
    original: str
    part: Part | None = None
    transpose: bool = False
    parameter: str = ".weight"

    @property
    def component(self) -> str:
        """The part before the first dot."""
        return self.module.partition(".")[0]

    @property
    def path(self) -> str:
        """The diffusers path inside the component."""
        return self.module.partition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module's place in a checkpoint: a key, perhaps some of its rows, perhaps transposed."""

    key: str
    part: Part | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Architecture:
    """A family of models with the same modules; its fields are all that lorakit knows of it.

    Args:
        id: `sd1`, `sd2`, `sdxl`.
        title: for people.
        base_model_version: kohya's `ss_base_model_version`.
        modelspec: modelspec's architecture.
        marks: what else the metadata may call it, in lower case.
        build: makes the table of modules.
        dimensions: last word of a path -> dimensions of such weights, where that tells the
            architecture from its likes; widths never do.
        kohya_original: whether kohya names the denoiser's modules as the single file does.
        clips: text encoder -> ComfyUI's name of it.
        places: prefix of the text encoders' keys in the single file -> component.
        blocks: block ids in the web UI's order, BASE first.
        block: canonical name of a denoiser's module -> block id.
        attention: the ids, without BASE, that hold attention: those of a short weight vector.
        presets: name -> the ids that are 1; those that hold for every architecture are not here.
    """

    id: str
    title: str
    base_model_version: str
    modelspec: str
    marks: tuple[str, ...] = ()
    build: Callable[[], tuple[ModuleName, ...]]
    dimensions: Mapping[str, int]
    kohya_original: bool
    clips: Mapping[str, str]
    places: Mapping[str, str]
    blocks: tuple[str, ...]
    block: Callable[[str], str]
    attention: tuple[str, ...]
    presets: Mapping[str, tuple[str, ...]]

    @property
    def modules(self) -> Mapping[str, ModuleName]:
        """The modules by canonical name."""
        return _by_module(self.build)

    @property
    def flat(self) -> Mapping[tuple[str, str], str]:
        """(component, flat name) -> canonical name, under the names of both layouts."""
        return _by_flat_name(self.build)

    @property
    def denoiser(self) -> str:
        """The component that is not a text encoder."""
        return next(iter(self.modules.values())).component

    @property
    def levels(self) -> int:
        """The levels of a UNet, three blocks each way."""
        return (len(self.blocks) - 2) // 6

    def component(self, spelled: str) -> str:
        """Return this architecture's name of a component that a file may name otherwise.

        kohya writes `lora_unet_` for a transformer too, and `lora_te_` for the only text encoder.
        """
        if spelled in DENOISERS:
            return self.denoiser
        if spelled == TEXT_ENCODERS[0] and len(self.clips) == 1:
            return next(iter(self.clips))
        return spelled

    def kohya_prefix(self, component: str) -> str:
        """Return the prefix of a component's modules in kohya's names."""
        if component in DENOISERS:
            return "lora_unet_"
        if len(self.clips) == 1:
            return "lora_te_"
        return f"lora_te{TEXT_ENCODERS.index(component) + 1}_"


@cache
def _by_module(build: Callable[[], tuple[ModuleName, ...]]) -> dict[str, ModuleName]:
    return {name.module: name for name in build()}


@cache
def _by_flat_name(build: Callable[[], tuple[ModuleName, ...]]) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for name in build():
        for path in (name.path, name.original) if name.part is None else (name.path,):
            key = (name.component, flat_name(path))
            if found.setdefault(key, name.module) != name.module:
                raise ValueError(f"{key} names both {found[key]} and {name.module}")
    return found


def flat_name(path: str) -> str:
    """Return a path as kohya flattens it, the text encoders' leading `text_model.` left out."""
    return path.replace(".", "_").removeprefix("text_model_")


def component_of(module: str) -> str:
    """Return the component of a module, canonical or as a file spells it; empty if it has none."""
    return spelling_of(module).component


def is_text_encoder(module: str) -> bool:
    """Tell whether a module, canonical or as a file spells it, is a text encoder's."""
    return component_of(module) in TEXT_ENCODERS or module.startswith("text_encoders.")
