"""What an architecture is: its modules under both of their names, and its blocks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from lorakit.names.spelling import DENOISERS, TEXT_ENCODERS, Spelling, spelling_of

Part = tuple[int, int, int]
"""(start, stop, of): rows [n · start // of, n · stop // of] of a tensor with n rows."""
Alias = tuple[str, Part | None]
"""Another path that a file may give a module, and the rows of it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleName:
    """One module: its canonical name, and its place in the original single file.

    Args:
        module: component and diffusers path, `unet.mid_block.attentions.0.proj_in`.
        original: the path in the single file, without the component's prefix.
        part: the rows of a tensor that holds several modules.
        transpose: whether the single file holds the transposed weight.
        swap: whether the single file holds the two halves of the output the other way round.
        norm: whether it is a norm: its weight is a vector, and no LoRA changes it.
        parameter: what the tensor's key adds to `original`.
        bare: whether it is a parameter by itself, whose key has no `.weight` in either layout.
        also: other paths, those of a third layout or of one trainer's LoRAs.
    """

    module: str
    original: str
    part: Part | None = None
    transpose: bool = False
    swap: bool = False
    norm: bool = False
    parameter: str = ".weight"
    bare: bool = False
    also: tuple[Alias, ...] = ()

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
    """A module's place in a checkpoint: a key, perhaps some of its rows, perhaps turned."""

    key: str
    part: Part | None = None
    transpose: bool = False
    swap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Architecture:
    """A family of models with the same modules; its fields are all that lorakit knows of it.

    Args:
        id: `sd1`, `sd2`, `sdxl`.
        title: for people.
        family: models of one family take each other's LoRAs; the id where it is empty.
        base_model_version: kohya's `ss_base_model_version`.
        modelspec: modelspec's architecture.
        marks: what else the metadata may call it, in lower case.
        build: makes the table of modules.
        roots: how the paths of its denoiser begin, in every layout; a model without any of them is
            another, so that most tables are never made.
        dimensions: last word of a path -> dimensions of such weights, where that tells the
            architecture from its likes.
        widths: last word of a path -> inputs of such weights, for likes that only widths tell
            apart; it never rules out, unless names are common.
        common: whether models of other families, unknown here, have the same names: then a width
            that is neither its own nor a shrunken model's rules it out.
        kohya_original: whether kohya names the denoiser's modules as the single file does.
        clips: text encoder -> ComfyUI's name of it.
        kohya_text: text encoder -> kohya's prefix, where it is not the usual one.
        places: prefix of the text encoders' keys in the single file -> component.
        blocks: block ids in the web UI's order, BASE first.
        block: canonical name of a denoiser's module, fused or not -> block id.
        text_blocks: text encoder -> block id, where it is not BASE.
        attention: the ids, without BASE, that hold attention: those of a short weight vector.
        presets: name -> the ids that are 1; those that hold for every architecture are not here.
    """

    id: str
    title: str
    base_model_version: str
    modelspec: str
    marks: tuple[str, ...] = ()
    build: Callable[[], tuple[ModuleName, ...]]
    roots: tuple[str, ...]
    dimensions: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    common: bool = False
    kohya_original: bool
    clips: Mapping[str, str]
    kohya_text: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str]
    blocks: tuple[str, ...]
    block: Callable[[str], str]
    text_blocks: Mapping[str, str] = field(default_factory=dict)
    attention: tuple[str, ...] = ()
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    family: str = ""

    @property
    def kin(self) -> str:
        """What the models that take each other's LoRAs have in common."""
        return self.family or self.id

    @property
    def modules(self) -> Mapping[str, ModuleName]:
        """The modules by canonical name, in the finest pieces: q, k and v apart."""
        return _tables(self.build).modules

    @property
    def fused(self) -> Mapping[str, tuple[tuple[str, Part], ...]]:
        """Canonical name of a fused module -> the modules in it, each with its rows."""
        return _tables(self.build).fused

    @property
    def fused_at(self) -> Mapping[tuple[str, str], str]:
        """(component, path) -> canonical name of the fused module that is there."""
        return _tables(self.build).fused_at

    @property
    def flat(self) -> Mapping[tuple[str, str], str]:
        """(component, flat name) -> canonical name, under the names of all layouts."""
        return _tables(self.build).flat

    @property
    def denoiser(self) -> str:
        """The component that is not a text encoder."""
        return next(iter(self.modules.values())).component

    @property
    def levels(self) -> int:
        """The levels of a UNet, three blocks each way."""
        return (len(self.blocks) - 2) // 6

    def original_fused(self, module: str) -> bool:
        """Tell whether the single file holds a fused module under this very name."""
        members = self.fused.get(module)
        if members is None:
            return False
        return self.modules[members[0][0]].original == module.partition(".")[2]

    def component(self, at: Spelling) -> str:
        """Return this architecture's name of the component that a file's prefix spells.

        kohya writes `lora_unet_` for a transformer too, `lora_te_` for the only text encoder, and
        `lora_te3_` for a T5 that diffusers calls the second; ComfyUI names encoders by their kind.
        """
        if at.component in DENOISERS or not at.component:
            return self.denoiser
        for component, name in self.clips.items():
            if at.encoder == name or (at.prefix and at.prefix == self.kohya_text.get(component)):
                return component
        if at.component == TEXT_ENCODERS[0] and len(self.clips) == 1:
            return next(iter(self.clips))
        return at.component

    def kohya_prefix(self, component: str) -> str:
        """Return the prefix of a component's modules in kohya's names."""
        if component in DENOISERS:
            return "lora_unet_"
        if component in self.kohya_text:
            return self.kohya_text[component]
        if len(self.clips) == 1:
            return "lora_te_"
        return f"lora_te{TEXT_ENCODERS.index(component) + 1}_"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tables:
    modules: Mapping[str, ModuleName]
    fused: Mapping[str, tuple[tuple[str, Part], ...]]
    fused_at: Mapping[tuple[str, str], str]
    flat: Mapping[tuple[str, str], str]


@cache
def _tables(build: Callable[[], tuple[ModuleName, ...]]) -> _Tables:
    flat: dict[tuple[str, str], str] = {}
    groups: dict[tuple[str, str], list[tuple[str, Part]]] = {}
    for name, path, part in _paths(build()):
        if part is None:
            _claim(flat, name.component, path, name.module)
        elif name.parameter == ".weight":
            groups.setdefault((name.component, path), []).append((name.module, part))
    fused: dict[tuple[tuple[str, Part], ...], str] = {}
    fused_at = {
        (component, path): fused.setdefault(tuple(members), f"{component}.{path}")
        for (component, path), members in groups.items()
    }
    for (component, path), module in fused_at.items():
        _claim(flat, component, path, module)
    return _Tables(
        modules={name.module: name for name in build()},
        fused={module: members for members, module in fused.items()},
        fused_at=fused_at,
        flat=flat,
    )


def _paths(names: tuple[ModuleName, ...]) -> Iterator[tuple[ModuleName, str, Part | None]]:
    """Yield every path of every module with its rows there: diffusers', original, the others."""
    for name in names:
        yield name, name.path, None
        yield name, name.original, name.part
    for name in names:
        for path, part in name.also:
            yield name, path, part


def _claim(flat: dict[tuple[str, str], str], component: str, path: str, module: str) -> None:
    key = (component, flat_name(path))
    if flat.setdefault(key, module) != module:
        raise ValueError(f"{key} names both {flat[key]} and {module}")


def flat_name(path: str) -> str:
    """Return a path as kohya flattens it, the text encoders' leading `text_model.` left out."""
    return path.replace(".", "_").removeprefix("text_model_")


def component_of(module: str) -> str:
    """Return the component of a module, canonical or as a file spells it; empty if it has none."""
    return spelling_of(module).component


def is_text_encoder(module: str) -> bool:
    """Tell whether a module, canonical or as a file spells it, is a text encoder's."""
    return component_of(module) in TEXT_ENCODERS or module.startswith("text_encoders.")
