"""A LoRA in memory, and how it is read."""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Lokr, Lora, build
from lorakit.compute import one_blas_thread
from lorakit.errors import AdapterError, FileFormatError, NumericsError
from lorakit.names.architectures import Architecture
from lorakit.names.blocks import block_of
from lorakit.names.checkpoints import BIAS
from lorakit.names.generic import generic
from lorakit.names.lorakeys import LoraKeys, ModuleKeys, read_keys
from lorakit.names.loratable import RANKED
from lorakit.peftconfig import AlphaOf, alpha_from_metadata
from lorakit.peftfolder import is_peft_folder, open_peft
from lorakit.report import name_some
from lorakit.tensorfile.plain import check_unchanged
from lorakit.tensorfile.source import (
    DictSource,
    TensorSource,
    dtype_name,
    open_source,
    torch_dtype,
)
from lorakit.tensorfile.whole import in_memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFile:
    """A map module -> adapter, with what the file says of itself; immutable.

    A change of a bias is a module of its own, `….bias`. `dtype` is the safetensors name of the
    dtype to store; `sha256` the hash of the tensors' bytes as they were read (Civitai's AutoV3),
    empty for a LoRA that was computed; `carried` are textual inversions that come along, by key;
    `unclaimed` the keys that nobody knew and that were left out on request.
    """

    name: str
    adapters: Mapping[str, Adapter]
    architecture: Architecture | None = None
    dialect: str = "kohya"
    dtype: str = "F16"
    metadata: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    unclaimed: tuple[str, ...] = ()

    def block(self, module: str) -> str:
        """Return the block id of a module."""
        return block_of(module, self.architecture)

    @property
    def blocks(self) -> Architecture:
        """What its blocks are called: its architecture's ids, or numbers where that is unknown."""
        return self.architecture or generic(self.adapters)

    @property
    def nbytes(self) -> int:
        """The bytes that the adapters take in memory."""
        tensors = (t for adapter in self.adapters.values() for t in adapter.tensors().values())
        return sum(t.numel() * t.element_size() for t in tensors)


def load_lora(
    path: str | Path | Mapping[str, Tensor],
    *,
    header_only: bool = False,
    allow_unmatched: bool = False,
    without: Collection[str] = (),
    mapped: bool = False,
) -> LoraFile:
    """Read a LoRA: a file, a PEFT folder, or tensors by key.

    Args:
        path: a `.safetensors` (or pickled) file, a folder with `adapter_config.json`, a folder
            with one such folder a component, or the tensors themselves.
        header_only: read no factor; the adapters then hold shapes (torch's meta device).
        allow_unmatched: leave out, and list in `unclaimed`, the keys that nobody knows.
        without: modules not to read.
        mapped: share the pages that the system keeps of the file instead of copying them, for a
            process that ends before anyone writes to the file in place.

    Raises:
        FileFormatError: it is no LoRA, or holds a tensor that nobody claims.
        AdapterError: a module's tensors do not make an adapter that lorakit knows.
        NumericsError: a factor holds NaN or infinity.
    """
    source, alpha_of = _open(path)
    keys = read_keys({key: spec.shape for key, spec in source.specs.items()}, source.metadata)
    _check_claims(source.name, keys, allow_unmatched)
    keys = replace(keys, modules={m: k for m, k in keys.modules.items() if m not in without})
    # The hash is a third of the work, and takes no hold of the interpreter. A tensor of a LoRA is
    # too small to be shared out over threads that wait for each other.
    with one_blas_thread(), ThreadPoolExecutor(1) as pool:
        held, hashed = (source, None) if header_only else in_memory(source, pool, mapped=mapped)
        adapters = {
            module: _adapter(held, module, spellings, alpha_of, header_only)
            for module, spellings in keys.modules.items()
        }
    check_unchanged(source)
    _check_wholes(source.name, keys.architecture, adapters)
    for module, spellings in keys.modules.items():
        if "lora_bias" in spellings[0].keys:
            adapters[module] = _scaled_bias(source, module, adapters)
    return LoraFile(
        name=source.name,
        adapters=adapters,
        architecture=keys.architecture,
        dialect=keys.dialect,
        dtype=stored_dtype(adapters.values()),
        metadata=dict(source.metadata),
        sha256="" if hashed is None else hashed.result(),
        carried={key: source.get(key) for key in keys.carried} if not header_only else {},
        unclaimed=keys.unclaimed,
    )


def _check_wholes(
    name: str, architecture: Architecture | None, adapters: Mapping[str, Adapter]
) -> None:
    """Check that no layer is there whole, as kohya has it, and in parts, as diffusers does."""
    fused = {} if architecture is None else architecture.fused
    for whole in adapters.keys() & fused.keys():
        parts = [part for part, _ in fused[whole] if part in adapters]
        if parts:
            raise FileFormatError(
                f"{name}: {whole} is stored whole and in parts ({name_some(parts)}), so that both "
                "would be added; delete one of them, lorakit cannot tell which is meant."
            )


def _scaled_bias(source: TensorSource, module: str, adapters: Mapping[str, Adapter]) -> Adapter:
    """Scale the bias of `lora_B` as the layer's factors are; of `diff_b` there is no scale."""
    layer = adapters.get(module.removesuffix(BIAS))
    if not isinstance(layer, Lora):
        raise AdapterError(
            f"{source.name}: {module} expected lora_A and lora_B beside the bias of lora_B, found "
            "none; the file is incomplete, get it again."
        )
    return adapters[module].scaled(layer.scale)


def stored_dtype(adapters: Iterable[Adapter]) -> str:
    """Return the narrowest dtype that holds every factor: fp16 and bf16 together need fp32."""
    factors = (
        tensor.dtype
        for adapter in adapters
        for tensor in adapter.tensors().values()
        if tensor.is_floating_point() and tensor.numel() > 1
    )
    return joint_dtype(dtype_name(dtype) for dtype in dict.fromkeys(factors))


def joint_dtype(names: Iterable[str]) -> str:
    """Return the one of safetensors' dtypes that holds values of all these."""
    found = sorted(set(names))
    if len(found) < 2:
        return found[0] if found else "F16"
    wide = [name for name in found if not name.startswith("F8")]
    if "F64" in wide:
        return "F64"
    return wide[0] if len(wide) == 1 and len(found) == 2 else "F32"


def _open(path: str | Path | Mapping[str, Tensor]) -> tuple[TensorSource, AlphaOf]:
    if not isinstance(path, Mapping) and Path(path).is_dir() and is_peft_folder(Path(path)):
        return open_peft(Path(path))
    source: TensorSource = DictSource(path) if isinstance(path, Mapping) else open_source(path)
    return source, alpha_from_metadata(source.metadata, source.name)


def _check_claims(name: str, keys: LoraKeys, allow_unmatched: bool) -> None:
    if not keys.modules:
        raise FileFormatError(
            f"{name}: expected a LoRA, found {len(keys.unclaimed)} tensors and no lora_up or "
            "lora_down among them; if it is a checkpoint, name it where a model belongs."
        )
    if keys.unclaimed and not allow_unmatched:
        raise FileFormatError(
            f"{name}: {len(keys.unclaimed)} tensors belong to no adapter that lorakit knows: "
            f"{name_some(keys.unclaimed)}; use --allow-unmatched to leave them out."
        )


def _adapter(
    source: TensorSource,
    module: str,
    spellings: tuple[ModuleKeys, ...],
    alpha_of: AlphaOf,
    header_only: bool,
) -> Adapter:
    first, *others = spellings
    tensors = {role: _read(source, key, header_only) for role, key in first.keys.items()}
    for other in others:
        _check_same(source, module, tensors, other, header_only)
    alpha = alpha_of(first.raw, _rank(tensors))
    try:
        adapter = build(first.kinds, tensors, alpha)
        whole = isinstance(adapter, Lokr) and adapter.rank is None
        return adapter if alpha is None or not whole else adapter.scaled(alpha)
    except (AdapterError, NumericsError) as error:
        raise type(error)(f"{source.name}: {first.raw} {_with_advice(error)}.") from None


def _with_advice(error: AdapterError | NumericsError) -> str:
    told = str(error)
    return told if ";" in told else f"{told}; get the file again from where it was made"


def _rank(tensors: Mapping[str, Tensor]) -> int:
    sides = [tensors[role] for role in RANKED if role in tensors and tensors[role].ndim]
    return int(sides[0].shape[0]) if sides else 0


def _read(source: TensorSource, key: str, header_only: bool) -> Tensor:
    spec = source.specs[key]
    if header_only and len(spec.shape) > 1:
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")
    return source.get(key)


def _check_same(
    source: TensorSource,
    module: str,
    tensors: Mapping[str, Tensor],
    other: ModuleKeys,
    header_only: bool,
) -> None:
    same = tensors.keys() == other.keys.keys() and (
        header_only
        or all(_equal(tensors[role], source.get(key)) for role, key in other.keys.items())
    )
    if not same:
        raise AdapterError(
            f"{source.name}: {module} is stored twice with different values, once as {other.raw}; "
            "delete one of them, lorakit cannot tell which is meant."
        )


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.is_complex() or second.is_complex():
        # No adapter has them: what is equal here is refused as soon as it is built.
        return first.dtype == second.dtype and torch.equal(first, second)
    # torch compares no fp8 with another dtype.
    return torch.equal(first.double(), second.double())
