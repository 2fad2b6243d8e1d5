"""A PEFT adapter on disk: one folder, or one a component of a pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit.errors import AdapterError, FileFormatError
from lorakit.linalg.rotations import Cayley, rotations, side_of
from lorakit.peftconfig import (
    CONFIG,
    WEIGHTS,
    AlphaOf,
    alpha_from_config,
    cayley_from_config,
    read_config,
)
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.source import TensorSource, open_source

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
ROOT = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joined:
    """Several adapters as one source; the component stands before each key."""

    name: str
    parts: Mapping[str, TensorSource]
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]

    def get(self, key: str) -> Tensor:
        """Read a tensor from the component that its key begins with."""
        component, _, rest = key.partition(".")
        return self.parts[component].get(rest)

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie."""
        component, _, rest = key.partition(".")
        return self.parts[component].extent(rest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turned:
    """An OFT whose numbers have become the rotations [1, blocks, n, n] that the configuration says.

    Args:
        base: the stored adapter.
        how: the configuration's settings.
        specs: those of the base, but for the rotations.
    """

    base: TensorSource
    how: Cayley
    specs: Mapping[str, Spec]

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def metadata(self) -> Mapping[str, str]:
        """The base's metadata."""
        return self.base.metadata

    def get(self, key: str) -> Tensor:
        """Read a tensor, or make rotations in fp32 of the one that is stored."""
        tensor = self.base.get(key)
        if self.specs[key] == self.base.specs[key]:
            return tensor
        return rotations(tensor, self.how).float()[None]

    def extent(self, key: str) -> Extent | None:
        """Tell where a tensor's bytes lie, None where they are not what `get` returns."""
        return self.base.extent(key) if self.specs[key] == self.base.specs[key] else None


def _turned(source: TensorSource, how: Cayley | None) -> TensorSource:
    if how is None:
        return source
    specs = dict(source.specs)
    for key, spec in source.specs.items():
        if ".oft_R" in key and len(spec.shape) == 2:
            size = side_of(spec.shape[1])
            if size * (size - 1) // 2 != spec.shape[1] or size < 2:
                raise AdapterError(
                    f"{source.name}: {key} expected n (n - 1) / 2 numbers a block, found "
                    f"{spec.shape[1]}; get the file again from where it was made."
                )
            specs[key] = Spec("F32", (1, spec.shape[0], size, size))
    return Turned(base=source, how=how, specs=specs)


def is_peft_folder(folder: Path) -> bool:
    """Tell whether a folder holds an adapter, or one a component."""
    return any((place / CONFIG).is_file() for place in (folder, *_components(folder).values()))


def open_peft(folder: Path) -> tuple[TensorSource, AlphaOf]:
    """Open a PEFT folder.

    Returns:
        The tensors, and the alpha that the configuration gives each module (a dotted path, with
        its component or with PEFT's own root).

    Raises:
        FileFormatError: there is no adapter inside.
        AdapterError: the configuration asks for more than a plain LoRA.
    """
    if (folder / CONFIG).is_file():
        config = read_config(folder)
        alpha_of = alpha_from_config(config, str(folder / CONFIG))
        source = _turned(_weights(folder), cayley_from_config(config, str(folder / CONFIG)))
        return source, lambda path, rank: alpha_of(_below(path), rank)
    found = {
        name: place for name, place in _components(folder).items() if (place / CONFIG).exists()
    }
    if not found:
        raise FileFormatError(
            f"{folder}: expected a PEFT adapter ({CONFIG}), found none; name a .safetensors file."
        )
    configs = {name: read_config(place) for name, place in found.items()}
    parts = {
        name: _turned(_weights(place), cayley_from_config(configs[name], str(found[name] / CONFIG)))
        for name, place in found.items()
    }
    readers = {
        name: alpha_from_config(config, str(found[name] / CONFIG))
        for name, config in configs.items()
    }
    specs = {f"{name}.{key}": s for name, part in parts.items() for key, s in part.specs.items()}
    joined = Joined(name=str(folder), parts=parts, specs=specs, metadata={})
    return joined, _by_component(readers)


def _by_component(readers: Mapping[str, AlphaOf]) -> Callable[[str, int], float | None]:
    def alpha_of(path: str, rank: int) -> float | None:
        component = path.partition(".")[0]
        return readers[component](_below(path), rank) if component in readers else None

    return alpha_of


def _components(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in COMPONENTS}


def _weights(folder: Path) -> TensorSource:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return open_source(folder / name)
    raise FileFormatError(f"{folder}: expected {WEIGHTS[0]} beside {CONFIG}, found none.")


def _below(path: str) -> str:
    component, _, rest = path.partition(".")
    below = rest if component in COMPONENTS else path
    return below.removeprefix(ROOT)
