"""inspect: what a file is, from its header alone, and what its blocks do."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import FileFormatError
from lorakit.names.architectures import Architecture, is_text_encoder
from lorakit.names.blocks import block_ids, block_of
from lorakit.names.checkpoints import index_checkpoint
from lorakit.names.lorakeys import LoraKeys, ModuleKeys, holds_lora, read_keys
from lorakit.names.loratable import RANKED
from lorakit.report import SCHEMA
from lorakit.tensorfile.header import Header, Spec, read_header, read_scalar

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of a LoRA; norm, share and effective rank where the tensors were read.

    `share` is the block's part of Σ‖ΔW‖²; `effective_rank` is ‖ΔW‖² / σ₁², the mean over layers.
    """

    id: str
    layers: int
    parameters: int
    norm: float | None = None
    share: float | None = None
    effective_rank: float | None = None
    dead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a file holds; counts map a value to how many layers or tensors have it.

    `unmeasured` are layers without a norm: their change depends on the model.
    """

    path: str
    kind: str
    architecture: str | None
    layout: str
    tensors: int
    nbytes: int
    dtypes: Mapping[str, int]
    layers: int
    adapters: Mapping[str, int] = field(default_factory=dict)
    components: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    dead: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()
    unclaimed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"schema": SCHEMA, "command": "inspect", **asdict(self)}


def inspect(path: str | Path, *, blocks: bool = False) -> Inspection:
    """Say what a file is: kind, architecture, dialect, ranks, alphas, blocks.

    Args:
        path: a LoRA or a checkpoint. One `.safetensors` file is answered from its header, without
            torch; folders, shards and pickles are opened.
        blocks: read the tensors too: norm, share of the energy and effective rank of each block,
            and the layers that are dead.

    Raises:
        FileFormatError: it is neither, or is broken.
    """
    place = Path(path)
    specs, metadata, header = _look(place)
    if not specs:
        raise FileFormatError(f"{place}: expected tensors, found none; get the file again.")
    if not holds_lora(specs):
        return _checkpoint(place, specs, metadata)
    keys = read_keys({key: spec.shape for key, spec in specs.items()}, metadata)
    found = _lora(place, specs, metadata, keys, header)
    return _with_norms(found, place) if blocks else found


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
        blocks=_blocks(dict.fromkeys(layers, 0), index.architecture),
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
        alphas=_counts(_alpha(f, specs, header) for f in first.values() if _has_rank(f)),
        blocks=_blocks(sizes, keys.architecture),
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


def _has_rank(found: ModuleKeys) -> bool:
    return any(role in found.keys for role in RANKED)


def _alpha(found: ModuleKeys, specs: Mapping[str, Spec], header: Header | None) -> str:
    key = found.keys.get("alpha")
    if key is None:
        return "none (= rank)"
    if header is None:
        return "?"
    value = read_scalar(header.extents[key], specs[key])
    return "?" if value is None else f"{value:g}"


def _blocks(sizes: Mapping[str, int], architecture: Architecture | None) -> tuple[Block, ...]:
    layers: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for module, size in sizes.items():
        block = block_of(module, architecture)
        layers[block] += 1
        parameters[block] += size
    order = [*block_ids(architecture), *sorted(layers)]
    ids = dict.fromkeys(block for block in order if block in layers)
    return tuple(
        Block(id=block, layers=layers[block], parameters=parameters[block]) for block in ids
    )


def _with_norms(found: Inspection, place: Path) -> Inspection:
    from lorakit.operations.blocknorms import block_norms

    return block_norms(found, place)


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
