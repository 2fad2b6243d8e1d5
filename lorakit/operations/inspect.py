"""inspect: what a file is, from its header alone, and what its blocks do."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import FileFormatError, SpecError
from lorakit.names.architectures import Architecture, is_text_encoder
from lorakit.names.blocks import block_ids, block_of
from lorakit.names.checkpoints import index_checkpoint
from lorakit.names.kinds import kind_of, ordered
from lorakit.names.lorakeys import LoraKeys, ModuleKeys, holds_lora, read_keys
from lorakit.names.loratable import RANKED
from lorakit.operations.inspection import Group, Inspection
from lorakit.tensorfile.header import Header, Spec, read_header, read_scalars

if TYPE_CHECKING:
    from lorakit.tensorfile.source import TensorSource


def inspect(
    path: str | Path,
    *,
    blocks: bool = False,
    spectrum: bool = False,
    against: "TensorSource | None" = None,
) -> Inspection:
    """Say what a file is: kind, architecture, dialect, ranks, alphas, blocks.

    Args:
        path: a LoRA or a checkpoint. One `.safetensors` file is answered from its header, without
            torch; folders, shards and pickles are opened.
        blocks: read the tensors too: norm, share of the energy and effective rank of each block
            and each kind of layer, and what is wrong with the layers.
        spectrum: read the tensors too: the energy that each rank would keep.
        against: a model, for ‖ΔW‖ / ‖W‖, and for layers whose change depends on it.

    Raises:
        FileFormatError: it is neither, or is broken.
        SpecError: a spectrum or a comparison of what is no LoRA.
    """
    place = Path(path)
    specs, metadata, header = _look(place)
    if not specs:
        raise FileFormatError(f"{place}: expected tensors, found none; get the file again.")
    if not holds_lora(specs):
        if spectrum or against is not None:
            raise SpecError(
                f"{place}: --spectrum and --against take LoRAs, found a checkpoint; extract the "
                "difference of two checkpoints first."
            )
        return _checkpoint(place, specs, metadata)
    keys = read_keys({key: spec.shape for key, spec in specs.items()}, metadata)
    found = _lora(place, specs, metadata, keys, header)
    if not (blocks or spectrum or against is not None):
        return found
    from lorakit.operations.blocknorms import measured

    return measured(found, place, spectrum=spectrum, against=against)


def _look(place: Path) -> tuple[Mapping[str, Spec], Mapping[str, str], Header | None]:
    """Read one safetensors file's header; open whatever else it may be."""
    if place.suffix == ".safetensors" or not place.exists():
        header = read_header(place)
        return header.specs, header.metadata, header
    from lorakit.peftfolder import is_peft_folder, open_peft
    from lorakit.tensorfile.source import open_source

    peft = place.is_dir() and is_peft_folder(place)
    source = open_peft(place)[0] if peft else open_source(place)
    return source.specs, source.metadata, None


def _checkpoint(place: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> Inspection:
    index = index_checkpoint({key: spec.shape for key, spec in specs.items()})
    layers = sorted(index.layers)
    return Inspection(
        path=str(place),
        kind="checkpoint",
        architecture=_title(index.architecture),
        layout=index.layout,
        tensors=len(specs),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        dtypes=_counts(spec.dtype for spec in specs.values()),
        layers=len(layers),
        components=_counts(module.partition(".")[0] for module in layers),
        blocks=_blocks(
            dict.fromkeys(layers, 0),
            {layer: block_of(layer, index.architecture) for layer in layers},
            index.architecture,
        ),
        metadata=dict(metadata),
    )


def _lora(
    place: Path,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    keys: LoraKeys,
    header: Header | None,
) -> Inspection:
    first = {module: spellings[0] for module, spellings in keys.modules.items()}
    sizes = {
        module: sum(specs[key].numel for key in module_keys.keys.values())
        for module, module_keys in first.items()
    }
    blocks = {module: block_of(module, keys.architecture) for module in sizes}
    kinds = {module: kind_of(module) for module in sizes}
    ranked = [found for found in first.values() if any(role in found.keys for role in RANKED)]
    return Inspection(
        path=str(place),
        kind="lora",
        architecture=_title(keys.architecture),
        layout=keys.dialect,
        tensors=len(specs),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        dtypes=_counts(spec.dtype for spec in specs.values()),
        layers=len(first),
        adapters=_counts(_kind(found, specs) for found in first.values()),
        components=_counts(_component(module) for module in first),
        ranks=_counts(_rank(found, specs) for found in first.values()),
        alphas=_alphas(place, ranked, header),
        blocks=_blocks(sizes, blocks, keys.architecture),
        kinds=_kinds(sizes, kinds),
        cells=_cells(sizes, blocks, kinds),
        unclaimed=keys.unclaimed,
        metadata=dict(metadata),
    )


def _title(architecture: Architecture | None) -> str | None:
    return None if architecture is None else architecture.title


def _component(module: str) -> str:
    head, dot, _ = module.partition(".")
    if dot:
        return head
    return "text_encoder" if is_text_encoder(module) else "model"


def _kind(found: ModuleKeys, specs: Mapping[str, Spec]) -> str:
    others = sorted(found.kinds - {"lora"})
    if others:
        return " + ".join(others)
    wide = any(
        max(specs[key].shape[2:], default=1) > 1
        for role, key in found.keys.items()
        if role in ("down", "mid")
    )
    return "locon" if wide else "lora"


def _rank(found: ModuleKeys, specs: Mapping[str, Spec]) -> str:
    sides = [specs[found.keys[role]].shape for role in RANKED if role in found.keys]
    if not sides:
        return "none"
    return str(sides[0][0]) if sides[0] else "?"


def _alphas(place: Path, ranked: Iterable[ModuleKeys], header: Header | None) -> dict[str, int]:
    keys = [found.keys.get("alpha") for found in ranked]
    stored = [key for key in keys if key is not None]
    values = {} if header is None else read_scalars(place, header, stored)
    texts = {key: f"{value:g}" for key, value in values.items()}
    return _counts("none (= rank)" if key is None else texts.get(key, "?") for key in keys)


def _blocks(
    sizes: Mapping[str, int], blocks: Mapping[str, str], architecture: Architecture | None
) -> tuple[Group, ...]:
    return _groups(sizes, blocks, [*block_ids(architecture), *sorted(blocks.values())])


def _kinds(sizes: Mapping[str, int], kinds: Mapping[str, str]) -> tuple[Group, ...]:
    named = {module: kinds[module] for module in sizes}
    return _groups(sizes, named, ordered(named.values()))


def _cells(
    sizes: Mapping[str, int], blocks: Mapping[str, str], kinds: Mapping[str, str]
) -> dict[str, tuple[Group, ...]]:
    inside: dict[str, dict[str, int]] = {}
    for module, size in sizes.items():
        inside.setdefault(blocks[module], {})[module] = size
    return {block: _kinds(modules, kinds) for block, modules in sorted(inside.items())}


def _groups(
    sizes: Mapping[str, int], named: Mapping[str, str], order: Iterable[str]
) -> tuple[Group, ...]:
    """Count layers and parameters by the names that modules have, in an order of the names."""
    layers = Counter(named.values())
    parameters: Counter[str] = Counter()
    for module, size in sizes.items():
        parameters[named[module]] += size
    ids = dict.fromkeys(name for name in order if name in layers)
    return tuple(Group(id=name, layers=layers[name], parameters=parameters[name]) for name in ids)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
