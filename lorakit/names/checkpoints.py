"""Checkpoint keys -> modules, in every layout, from the checkpoint's own keys."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from lorakit.errors import FileFormatError
from lorakit.names.architectures import Architecture, Part, Target, flat_name
from lorakit.names.detection import (
    candidates,
    deep_enough,
    has_dimensions,
    has_widths,
    most_known,
    preferred,
)
from lorakit.names.families import ARCHITECTURES
from lorakit.names.spelling import DENOISERS, TEXT_ENCODERS, spelling_of

_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.")
_MODEL = "model."
BIAS = ".bias"
_FOLDERS = (*DENOISERS, *TEXT_ENCODERS)
_OTHER = ("first_stage_model.", "vae/", "vae.", "model_ema.", "safety_checker/")
_TABLE = re.compile(r"embedding|pos_embed|^embed_|^(?:wte|wpe|shared)$|attention_bias$|norm")
"""Last words of weights that look things up, or scale: no layers, though they are matrices."""
_RECENT = 4
_KNOWN = 0.75
"""Of a whole model's weights an architecture must know more than this."""
_WRAPPERS = ("model.", "language_model.", "transformer.", "module.")
"""What stands before a model's layers, or does not: it depends on the class that saved it."""
_PARAMETERS = ("_weight", ".weight", ".scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A checkpoint key taken apart; `layout` is empty where the key does not tell it."""

    component: str
    path: str
    layout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A module that a tensor holds under one layout's name."""

    module: str
    part: Part | None = None
    transpose: bool = False
    swap: bool = False
    layout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """Where each module of a checkpoint lives.

    Args:
        architecture: None where lorakit does not know it.
        layout: "original", "diffusers", or "generic" for models under their own names.
        targets: canonical name -> place; the model's own path where no table names it.
        flat: (component, flat name) -> canonical name, for names that no table knows.
        layers: the modules that a LoRA can change: no norms, no embeddings or projections of them.
        biases: key of a weight -> key of the bias beside it.
    """

    architecture: Architecture | None
    layout: str
    targets: Mapping[str, Target]
    flat: Mapping[tuple[str, str], str]
    layers: frozenset[str]
    biases: Mapping[str, str]

    def find(self, module: str) -> Target | None:
        """Return the place of a module, or of its `.bias`, canonical or as a file spells it."""
        if module in self.targets:
            return self.targets[module]
        if module.endswith(BIAS):
            weight = self.find(module.removesuffix(BIAS))
            bias = None if weight is None else self.biases.get(weight.key)
            return None if weight is None or bias is None else replace(weight, key=bias)
        at = spelling_of(module)
        path = flat_name(at.path)
        name = None
        if self.architecture is not None:
            name = self.architecture.flat.get((self.architecture.component(at), path))
        for found in (path, flat_name(unwrapped(at.path))):
            for component in (_side(at.component or DENOISERS[0]), ""):
                name = name or self.flat.get((component, found))
        return None if name is None else self.targets.get(name)

    def members(self, module: str) -> tuple[tuple[str, Part], ...]:
        """Return the modules inside a fused one, each with its rows; none if it is not fused."""
        return () if self.architecture is None else self.architecture.fused.get(module, ())

    def has_component(self, component: str) -> bool:
        """Tell whether the checkpoint holds any module of a component."""
        return any(module.partition(".")[0] == component for module in self.targets)

    def suggestions(self, module: str) -> list[str]:
        """Return the names there that are closest to one that is not."""
        return difflib.get_close_matches(module, self.targets, n=1, cutoff=0.6)


def index_checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> CheckpointIndex:
    """Find the modules of a checkpoint among its keys.

    Args:
        shapes: key -> shape, the keys of a folder with their `component/`.

    Raises:
        FileFormatError: two keys are the same module, so that one of them would stay as it is.
    """
    return _indexed(tuple((key, tuple(shape)) for key, shape in shapes.items()))


# A command looks at a model more than once, and at two of one architecture.
@lru_cache(maxsize=_RECENT)
def _indexed(entries: tuple[tuple[str, tuple[int, ...]], ...]) -> CheckpointIndex:
    shapes = dict(entries)
    weights = {key: shape for key, shape in shapes.items() if shape and not key.startswith(_OTHER)}
    architecture = _architecture({k: shape for k, shape in weights.items() if len(shape) > 1})
    targets: dict[str, Target] = {}
    components = _trained(architecture, weights)
    own: dict[str, _Place] = {}
    layouts: list[str] = []
    layers: set[str] = set()
    for key, shape in weights.items():
        place = _place(key, architecture)
        held = _held(architecture, place)
        for at in held:
            target = Target(key=key, part=at.part, transpose=at.transpose, swap=at.swap)
            _claim(targets, at.module, target)
            layouts.append(place.layout or at.layout)
        if not held and place.path.endswith(_PARAMETERS):
            path = _stem(place.path)
            module = f"{place.component}.{path}" if place.component else path
            _claim(targets, module, Target(key=key))
            own[module] = place
            layouts.append(place.layout)
            if place.component in components and _takes_lora(module, shape):
                layers.add(module)
    if architecture is not None:
        known = {m for m, name in architecture.modules.items() if m in targets and not name.norm}
        layers |= {module for module in known if not module.endswith("text_projection")}
    told = [layout for layout in layouts if layout]
    return CheckpointIndex(
        architecture=architecture,
        layout=max(sorted(set(told)), key=told.count, default="generic"),
        targets=targets,
        flat=_flattened(own),
        layers=frozenset(layers),
        biases={key: bias for key in weights if (bias := _bias_beside(key)) in shapes},
    )


def _trained(architecture: Architecture | None, keys: Iterable[str]) -> tuple[str, ...]:
    """Return the components whose layers a LoRA changes though no table names them.

    Beside a denoiser that is known there is much else without a name, unless it is alone.
    """
    if architecture is None:
        return ("", *_FOLDERS)
    starts = (*_DENOISER_PREFIXES, f"{architecture.denoiser}/", *_text_prefixes())
    alone = not any(key.startswith(starts) for key in keys)
    return ("", architecture.denoiser) if alone else (architecture.denoiser,)


def _flattened(own: Mapping[str, _Place]) -> dict[tuple[str, str], str]:
    """Return (component, flat name) -> module, also without wrappers where that is unambiguous."""
    flat: dict[tuple[str, str], str] = {}
    bare: dict[tuple[str, str], list[str]] = {}
    for module, place in own.items():
        path, side = _stem(place.path), _side(place.component)
        flat.setdefault((side, flat_name(path)), module)
        bare.setdefault((side, flat_name(unwrapped(path))), []).append(module)
    return {at: modules[0] for at, modules in bare.items() if len(modules) == 1} | flat


def _takes_lora(module: str, shape: tuple[int, ...]) -> bool:
    last = module.rpartition(".")[2]
    table = len(shape) == 2 and _TABLE.search(last) is not None
    return len(shape) > 1 and not table and not module.endswith("text_projection")


def unwrapped(path: str) -> str:
    """Return a path without the names of the classes around its model."""
    while path.startswith(_WRAPPERS):
        path = path.partition(".")[2]
    return path


def _bias_beside(key: str) -> str:
    return f"{key.removesuffix('weight')}bias" if key.endswith("weight") else ""


def _claim(targets: dict[str, Target], module: str, target: Target) -> None:
    other = targets.setdefault(module, target)
    if other.key != target.key:
        raise FileFormatError(
            f"{other.key} and {target.key} are both {module}: expected one of them; delete the one "
            "that is not in use."
        )


def _architecture(weights: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """Tell the architecture by its names; between its likes, by how `proj_in` is stored."""
    bare = [_without_prefix(key) for key in weights if _of_denoiser(key)]
    best = most_known(
        weights,
        _of_denoiser,
        lambda a, key: bool(_held(a, _place(key, a))),
        deep_enough(candidates(bare), bare),
        share=_KNOWN,
    )
    paths = {_stem(key): shape for key, shape in weights.items()}
    best = preferred(best, lambda a: has_dimensions(a, paths), lambda a: has_widths(a, paths))
    return best[0] if best else None


def _of_denoiser(key: str) -> bool:
    return not key.startswith(_text_prefixes())


def _without_prefix(key: str) -> str:
    for prefix in (*_DENOISER_PREFIXES, *(f"{component}/" for component in DENOISERS), _MODEL):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _place(key: str, architecture: Architecture | None) -> _Place:
    for prefix, component in _prefixes(architecture).items():
        if key.startswith(prefix):
            layout = "diffusers" if prefix.endswith("/") else "original"
            return _Place(component=component, path=key.removeprefix(prefix), layout=layout)
    if architecture is not None:
        component = architecture.denoiser
        if (component, _bare(key)) in _paths(architecture):
            return _Place(component=component, path=key, layout="")
    return _Place(component="", path=key, layout="generic")


@cache
def _prefixes(architecture: Architecture | None) -> dict[str, str]:
    found = {f"{component}/": component for component in _FOLDERS}
    if architecture is None:
        return found | dict.fromkeys(_DENOISER_PREFIXES, DENOISERS[0])
    found |= architecture.places
    found |= {f"text_encoders.{clip}.transformer.": c for c, clip in architecture.clips.items()}
    # In a model without a table `model.` may be anything; here it is AuraFlow's.
    return found | dict.fromkeys((*_DENOISER_PREFIXES, _MODEL), architecture.denoiser)


@cache
def _text_prefixes() -> tuple[str, ...]:
    places = (place for architecture in ARCHITECTURES for place in architecture.places)
    return (*places, *(f"{component}/" for component in TEXT_ENCODERS), "text_encoders.")


def _held(architecture: Architecture | None, place: _Place) -> tuple[_Held, ...]:
    """Return the modules that a key holds: one, three where q, k and v are fused, or none."""
    if architecture is None:
        return ()
    return _paths(architecture).get((place.component, _bare(place.path)), ())


@cache
def _paths(architecture: Architecture) -> dict[tuple[str, str], tuple[_Held, ...]]:
    """Return (component, path with parameter) -> modules, under the paths of all layouts."""
    table: dict[tuple[str, str], dict[str, _Held]] = {}
    for name in architecture.build():
        same = name.path == name.original
        here = _Held(module=name.module, layout="" if same else "diffusers")
        own = name.path if name.bare else f"{name.path}.weight"
        table.setdefault((name.component, _bare(own)), {})[name.module] = here
        for path, part in ((name.original, name.part), *name.also):
            key = path if name.bare else path + name.parameter
            table.setdefault((name.component, _bare(key)), {})[name.module] = _Held(
                module=name.module,
                part=part,
                transpose=name.transpose,
                swap=name.swap,
                layout="" if same else "original",
            )
    for (component, path), module in architecture.fused_at.items():
        held = _Held(module=module, layout="original")
        table[component, _bare(f"{path}.weight")][module] = held
    return {key: tuple(held.values()) for key, held in table.items()}


def _bare(path: str) -> str:
    return path.removeprefix("text_model.")


def _stem(path: str) -> str:
    for parameter in _PARAMETERS:
        if path.endswith(parameter):
            return path.removesuffix(parameter)
    return path


def _side(component: str) -> str:
    """Return one name for all denoisers: kohya's `lora_unet_` may be a transformer."""
    return DENOISERS[0] if component in DENOISERS else component
