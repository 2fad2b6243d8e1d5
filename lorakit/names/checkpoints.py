"""Checkpoint keys -> modules, in every layout, from the checkpoint's own keys."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from lorakit.errors import FileFormatError
from lorakit.names.architectures import Architecture, ModuleName, Part, Target, flat_name
from lorakit.names.detection import has_dimensions, most_known, preferred
from lorakit.names.families import ARCHITECTURES
from lorakit.names.spelling import DENOISERS, TEXT_ENCODERS, spelling_of

_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FOLDERS = (*DENOISERS, *TEXT_ENCODERS)
_OTHER = ("first_stage_model.", "vae/", "vae.", "model_ema.", "safety_checker/")
_NO_LAYER = ("embedding", "text_projection", "pos_embed", "norm")
_PARAMETERS = ("_weight", ".weight")


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
    part: Part | None
    transpose: bool
    layout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """Where each module of a checkpoint lives.

    Args:
        architecture: None where lorakit does not know it.
        layout: "original", "diffusers", or "generic" for models under their own names.
        targets: canonical name -> place; the model's own path where no table names it.
        flat: (component, flat name) -> canonical name, for names that no table knows.
    """

    architecture: Architecture | None
    layout: str
    targets: Mapping[str, Target]
    flat: Mapping[tuple[str, str], str]

    def find(self, module: str) -> Target | None:
        """Return the place of a module, canonical or as a file spells it."""
        if module in self.targets:
            return self.targets[module]
        at = spelling_of(module)
        path = flat_name(at.path)
        name = None
        if self.architecture is not None:
            name = self.architecture.flat.get((self.architecture.component(at.component), path))
        for component in (_side(at.component or DENOISERS[0]), ""):
            name = name or self.flat.get((component, path))
        return None if name is None else self.targets.get(name)

    def layers(self) -> frozenset[str]:
        """Return the modules that a LoRA can change: no embeddings, no projections of them."""
        if self.architecture is not None:
            known = self.architecture.modules
            return frozenset(
                module
                for module in self.targets
                if module in known and not module.endswith("text_projection")
            )
        return frozenset(
            module for module in self.targets if not any(word in module for word in _NO_LAYER)
        )

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
    weights = {
        key: shape for key, shape in shapes.items() if len(shape) > 1 and not key.startswith(_OTHER)
    }
    architecture = _architecture(weights)
    targets: dict[str, Target] = {}
    flat: dict[tuple[str, str], str] = {}
    layouts: list[str] = []
    for key in weights:
        place = _place(key, architecture)
        held = _held(architecture, place)
        for at in held:
            _claim(targets, at.module, Target(key=key, part=at.part, transpose=at.transpose))
            layouts.append(place.layout or at.layout)
        if not held and place.path.endswith(_PARAMETERS):
            own = _stem(place.path)
            module = f"{place.component}.{own}" if place.component else own
            _claim(targets, module, Target(key=key))
            flat.setdefault((_side(place.component), flat_name(own)), module)
            layouts.append(place.layout)
    told = [layout for layout in layouts if layout]
    layout = max(sorted(set(told)), key=told.count, default="generic")
    return CheckpointIndex(architecture=architecture, layout=layout, targets=targets, flat=flat)


def _claim(targets: dict[str, Target], module: str, target: Target) -> None:
    other = targets.setdefault(module, target)
    if other.key != target.key:
        raise FileFormatError(
            f"{other.key} and {target.key} are both {module}: expected one of them; delete the one "
            "that is not in use."
        )


def _architecture(weights: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """Tell the architecture by its names; between its likes, by how `proj_in` is stored."""
    denoiser = [key for key in weights if not key.startswith(_text_prefixes())]
    best = most_known(weights, denoiser, lambda a, key: bool(_held(a, _place(key, a))))
    paths = {_stem(key): shape for key, shape in weights.items()}
    best = preferred(best, lambda a: has_dimensions(a, paths))
    return best[0] if best else None


def _place(key: str, architecture: Architecture | None) -> _Place:
    for prefix, component in _prefixes(architecture).items():
        if key.startswith(prefix):
            layout = "diffusers" if prefix.endswith("/") else "original"
            return _Place(component=component, path=key.removeprefix(prefix), layout=layout)
    if architecture is not None:
        component = architecture.denoiser
        if (component, key) in _paths(architecture.build):
            return _Place(component=component, path=key, layout="")
    return _Place(component="", path=key, layout="generic")


@cache
def _prefixes(architecture: Architecture | None) -> dict[str, str]:
    found = {f"{component}/": component for component in _FOLDERS}
    if architecture is None:
        return found | dict.fromkeys(_DENOISER_PREFIXES, DENOISERS[0])
    found |= architecture.places
    found |= {f"text_encoders.{clip}.transformer.": c for c, clip in architecture.clips.items()}
    return found | dict.fromkeys(_DENOISER_PREFIXES, architecture.denoiser)


@cache
def _text_prefixes() -> tuple[str, ...]:
    places = (place for architecture in ARCHITECTURES for place in architecture.places)
    return (*places, *(f"{component}/" for component in TEXT_ENCODERS), "text_encoders.")


def _held(architecture: Architecture | None, place: _Place) -> tuple[_Held, ...]:
    """Return the modules that a key holds: one, three where q, k and v are fused, or none."""
    if architecture is None:
        return ()
    return _paths(architecture.build).get((place.component, _bare(place.path)), ())


@cache
def _paths(build: Callable[[], tuple[ModuleName, ...]]) -> dict[tuple[str, str], tuple[_Held, ...]]:
    """Return (component, path with parameter) -> modules, under both layouts' paths."""
    table: dict[tuple[str, str], tuple[_Held, ...]] = {}
    for name in build():
        original, diffusers = _bare(name.original + name.parameter), _bare(f"{name.path}.weight")
        layout = "" if original == diffusers else "original"
        places = {
            diffusers: _Held(module=name.module, part=None, transpose=False, layout="diffusers")
        }
        places[original] = _Held(
            module=name.module, part=name.part, transpose=name.transpose, layout=layout
        )
        for path, held in places.items():
            key = (name.component, path)
            table[key] = (*table.get(key, ()), held)
    return table


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
