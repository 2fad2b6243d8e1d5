"""compare: how the ΔW of several LoRAs lie to each other, from their factors alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, SpecError
from lorakit.fusing import as_named, is_split, split
from lorakit.linalg.factored import Factors, decomposed, numerical_rank
from lorakit.linalg.overlap import Frame, chance, frame_of, overlap
from lorakit.linalg.ranks import RankRule, choose_rank
from lorakit.linalg.tiles import dense
from lorakit.methods.angular import gram_of
from lorakit.methods.cores import as_factors
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.methods.sampling import places_of
from lorakit.models import Model, open_model
from lorakit.operations.advice import advice
from lorakit.operations.comparison import TOTAL, Compared, Comparison, Matrix
from lorakit.operations.stack import Stack, architecture_of
from lorakit.operations.strength import strength_at
from lorakit.progress import Progress, silent
from lorakit.tensorfile.source import TensorSource


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """One layer's numbers, each [T, T] in fp64; `kept` and `whole` are of the sum's energy."""

    block: str
    gram: Tensor
    overlap: Tensor
    chance: Tensor
    conflict: Tensor
    kept: float = 0.0
    whole: float = 0.0


def compare(
    stack: Stack,
    *,
    rule: RankRule | None = None,
    against: TensorSource | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare LoRAs at their strengths: norms, angles, shared directions, conflicts of sign.

    A layer that a LoRA lacks counts as zero in it. All but the conflicts is exact, from the
    factors; conflicts are counted on at most 65,536 elements of each layer, spread over it.

    Args:
        stack: (LoRA, strength) pairs, two or more.
        rule: a rank rule; the comparison tells what it keeps of the plain sum.
        against: the model that DoRA and its likes are taken on.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        SpecError: there are less than two LoRAs.
        AdapterError: they are for different models, or one needs a model to be taken on.
    """
    if len(stack) < 2:
        raise SpecError(f"compare needs two LoRAs or more, found {len(stack)}; name another one.")
    architecture_of(stack)
    model = None if against is None else open_model(against)
    # Where one LoRA names the parts of a layer that another names whole, both are cut into parts.
    if any(is_split(lora) for lora, _ in stack):
        named = [(split(lora), strength) for lora, strength in stack]
    else:
        named = [(as_named(lora, stack[0][0].dialect), strength) for lora, strength in stack]
    modules = sorted({module for lora, _ in named for module in lora.adapters})
    measure = partial(_measured, named, model, rule)
    layers = []
    jobs = ordered_map(measure, modules, compute=compute or Compute.of())
    for done, layer in enumerate(jobs, start=1):
        layers.append(layer)
        progress("layers", done, len(modules))
    names = tuple(lora.name for lora, _ in stack)
    return summed("loras", names, layers, order=named[0][0].blocks.blocks, only_in=_only_in(named))


def summed(
    kind: str,
    names: tuple[str, ...],
    layers: Sequence[Layer],
    *,
    order: Sequence[str],
    only_in: Mapping[str, int],
    notes: tuple[str, ...] = (),
) -> Comparison:
    """Put layers together by block and in total, and say what it means.

    Args:
        kind: what is compared.
        names: of what is compared, perhaps paths; shortened where that leaves them apart.
        layers: a row a layer.
        order: of the blocks.
        only_in: name -> the layers that not all of them have.
        notes: what else is to be said.
    """
    found = {layer.block for layer in layers}
    blocks = [b for b in order if b in found] + sorted(found.difference(order))
    rows = tuple(_together(b, [one for one in layers if one.block == b]) for b in blocks)
    total = _together(TOTAL, layers)
    short = _short(names)
    return Comparison(
        kind=kind,
        names=short,
        blocks=rows,
        total=total,
        only_in={short[names.index(name)]: count for name, count in only_in.items()},
        advice=advice(short, total, kind),
        notes=notes,
    )


def _short(names: tuple[str, ...]) -> tuple[str, ...]:
    short = [name.replace("\\\\", "/").rstrip("/").rpartition("/")[2] for name in names]
    plain = [name.removesuffix(".safetensors") for name in short]
    return tuple(plain) if len(set(plain)) == len(plain) else names


def _measured(stack: Stack, model: Model | None, rule: RankRule | None, module: str) -> Layer:
    deltas = [_delta(lora_strength, model, module) for lora_strength in stack]
    shape = next(delta.shape for delta in deltas if delta is not None)
    nothing = Factors(up=torch.zeros(shape[0], 1), down=torch.zeros(1, shape[1]))
    filled = [delta or Delta(change=nothing, strength=1.0) for delta in deltas]
    if any(delta.shape != shape for delta in filled):
        raise AdapterError(
            f"{module} has changes of shapes {' and '.join(str(list(d.shape)) for d in filled)}; "
            "these LoRAs are for different models."
        )
    strengths = torch.tensor([delta.strength for delta in filled], dtype=torch.float64)
    factors = [as_factors(delta.change) for delta in filled]
    frames = [frame_of(one) for one in factors]
    lora, _ = next(entry for entry, delta in zip(stack, deltas, strict=True) if delta is not None)
    layer = Layer(
        block=lora.block(module),
        gram=gram_of(filled) * strengths * strengths[:, None],
        overlap=_pairs(frames, overlap),
        chance=_pairs(frames, chance),
        conflict=_conflict(filled),
    )
    return layer if rule is None else _with_energy(layer, filled, rule)


def _delta(entry: tuple, model: Model | None, module: str) -> Delta | None:  # type: ignore[type-arg]
    lora, strength = entry
    adapter = lora.adapters.get(module)
    at = 0.0 if adapter is None else strength_at(strength, lora, module)
    if adapter is None or not at:
        return None
    if adapter.needs_base and model is None:
        raise AdapterError(
            f"{lora.name}: {module} is {adapter.kind}, whose change depends on the weight that it "
            "changes; name the model with --against."
        )
    base = model.weight(module) if adapter.needs_base and model is not None else None
    return Delta(change=adapter.change(base), strength=at)


def _pairs(frames: Sequence[Frame], measure: Callable[[Frame, Frame], float]) -> Tensor:
    found = torch.zeros(len(frames), len(frames), dtype=torch.float64)
    for i, one in enumerate(frames):
        for j in range(i, len(frames)):
            found[i, j] = found[j, i] = measure(one, frames[j])
    return found


def _conflict(deltas: Sequence[Delta]) -> Tensor:
    """Return the share of a sample's elements in which two signs disagree."""
    rows, columns = places_of(deltas[0].shape)
    signs = []
    for delta in deltas:
        change = delta.change
        if isinstance(change, Factors):
            some = change.up[rows].double() @ change.down[:, columns].double()
        else:
            some = dense(change)[rows][:, columns].double()
        signs.append((some * delta.strength).sign().flatten())
    stacked = torch.stack(signs)
    both = stacked.abs() @ stacked.abs().T
    return torch.where(both > 0, (1 - stacked @ stacked.T / both.clamp(min=1)) / 2, 0.0)


def _with_energy(layer: Layer, deltas: Sequence[Delta], rule: RankRule) -> Layer:
    found = decomposed(as_factors(linear(deltas)))
    values = found.s[: numerical_rank(found.s, deltas[0].shape)]
    whole = float(values.square().sum())
    kept = float(values[: choose_rank(values, rule)].square().sum())
    return replace(layer, kept=kept, whole=whole)


def _together(block: str, layers: Sequence[Layer]) -> Compared:
    gram = torch.stack([layer.gram for layer in layers]).sum(dim=0)
    whole = math.fsum(layer.whole for layer in layers)
    return Compared(
        block=block,
        layers=len(layers),
        gram=_tuples(gram),
        overlap=_mean(layers, [layer.overlap for layer in layers]),
        chance=_mean(layers, [layer.chance for layer in layers]),
        conflict=_mean(layers, [layer.conflict for layer in layers]),
        energy=math.fsum(layer.kept for layer in layers) / whole if whole else None,
    )


def _mean(layers: Sequence[Layer], values: Sequence[Tensor]) -> Matrix:
    """Return the mean over the layers that both have, weighed by the product of their norms."""
    total, weights = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for layer, value in zip(layers, values, strict=True):
        norms = layer.gram.diagonal().clamp(min=0).sqrt()
        weight = norms * norms[:, None]
        total += weight * value
        weights += weight
    return _tuples(torch.where(weights > 0, total / weights.clamp(min=1e-300), 0.0))


def _tuples(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())


def _only_in(stack: Stack) -> dict[str, int]:
    shared = set.intersection(*(set(lora.adapters) for lora, _ in stack))
    counts = {lora.name: len(lora.adapters.keys() - shared) for lora, _ in stack}
    return {name: count for name, count in counts.items() if count}
