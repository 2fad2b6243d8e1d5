"""Scores: what directions are measured by, read off a model's layers once for several LoRAs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import NumericsError, SpecError
from lorakit.linalg.norms import frobenius, spectral
from lorakit.models import Model
from lorakit.operations.pieces import Piece
from lorakit.operations.spectra import all_directions
from lorakit.operations.stack import flat
from lorakit.progress import Progress, silent
from lorakit.tensorfile.header import Extent, Spec
from lorakit.tensorfile.source import TensorSource

OF_MODEL = ("spn-ckpt", "fro-ckpt", "subspace")
OF_LORA = ("spn-lora", "fro-lora")
DEFAULT = "fro-ckpt"
"""What a model's layers are measured by where nothing else is asked for, as in resize_lora."""
_ROUNDING = float(torch.finfo(torch.float32).eps)
_ELEMENT = 12
"""Bytes that measuring takes for an element of a weight: as stored, in fp32, a copy."""


def parse_score(text: str) -> dict[str, float]:
    """Read a score: a reference's name, or several with weights, `fro-ckpt=0.8,spn-lora=0.2`.

    Returns:
        The share of each reference in their geometric mean; the shares sum to 1.

    Raises:
        SpecError: a name is unknown or there twice, or a weight is not above 0.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        spelled, sign, number = part.partition("=")
        name = spelled.strip().replace("_", "-")
        if name not in (*OF_MODEL, *OF_LORA) or name in weights:
            raise SpecError(
                f"'{part.strip()}' is no score, or there twice; give {', '.join(OF_MODEL)}, "
                f"{' or '.join(OF_LORA)}, or several with weights: fro-ckpt=0.8,spn-lora=0.2."
            )
        weights[name] = _weight_of(part, number) if sign else 1.0
    whole = math.fsum(weights.values())
    return {name: weight / whole for name, weight in weights.items()}


def _weight_of(part: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise SpecError(f"'{part.strip()}' expected a weight above 0, found '{number.strip()}'.")
    return weight


def needs_model(score: str) -> bool:
    """Tell whether a score is relative to a model."""
    return any(name in OF_MODEL for name in parse_score(score))


def measured(
    loras: Sequence[Sequence[Piece]],
    *,
    score: str,
    model: Model,
    compute: Compute,
    progress: Progress = silent,
) -> list[dict[str, Tensor]]:
    """Measure a model's layers once for several LoRAs, a layer at a time.

    Args:
        loras: each one's pieces; those that the model lacks, biases and norms are passed over.
        score: see `parse_score`.
        model: whose weights are measured.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Returns:
        For each LoRA module -> log10 of what of the reference hangs on the model: see `Yardstick`.

    Raises:
        NumericsError: a weight holds NaN or infinity.

    Cost: one read of the layers that the LoRAs change. For `spn-ckpt` some thirty products of each
    with a vector; for `subspace` the LoRAs' decompositions, and one product with their directions.
    """
    weights = {name: share for name, share in parse_score(score).items() if name in OF_MODEL}
    jobs = _jobs(loras, model) if weights else []
    work = partial(_measure, model=model, weights=weights, compute=compute)
    along = "subspace" in weights

    def cost(job: _Job) -> int:
        return sum(_ELEMENT * math.prod(p.shape) + (p.cost if along else 0) for _, p in job)

    # Small tensors made between large ones would keep the heap from shrinking: one table for all.
    members = [one for job in jobs for one in job]
    width = max((piece.rank_bound for _, piece in members), default=1) if along else 1
    table = torch.zeros(len(members), width, dtype=torch.float64)
    lengths: list[int] = []
    for done, found in enumerate(ordered_map(work, jobs, compute=compute, cost=cost), start=1):
        for values in found:
            table[len(lengths), : len(values)] = torch.tensor(values, dtype=torch.float64)
            lengths.append(len(values) if along else 0)
        progress("weights", done, len(jobs))
    references: list[dict[str, Tensor]] = [{} for _ in loras]
    for (place, piece), row, length in zip(members, table, lengths, strict=True):
        references[place][piece.module] = row[:length] if along else row[0]
    return references


_Job = tuple[tuple[int, Piece], ...]


def _jobs(loras: Sequence[Sequence[Piece]], model: Model) -> list[_Job]:
    """Put together what one tensor of the model answers, so that it is read once."""
    groups: dict[str, list[tuple[int, Piece]]] = {}
    for place, pieces in enumerate(loras):
        for piece in pieces:
            slots = [model.slot(part) for part in model.parts(piece.module)]
            if slots and slots[0] is not None and not piece.vector:
                groups.setdefault(slots[0].key, []).append((place, piece))
    return [tuple(sorted(groups[key], key=_layer)) for key in model.source.specs if key in groups]


def _measure(
    job: _Job, *, model: Model, weights: Mapping[str, float], compute: Compute
) -> list[list[float]]:
    once = replace(model, source=_Once(base=model.source))
    found: list[list[float]] = []
    # Several LoRAs have the same layer, and a tensor may hold several layers.
    for _, group in groupby(job, key=_layer):
        same = [piece for _, piece in group]
        weight = weight_under(once, same[0]).to(compute.torch_device)
        try:
            found += _of_layer(same, weight, weights, compute)
        except NumericsError as error:
            raise NumericsError(f"{model.source.name}: {error}") from None
    return found


def _of_layer(
    same: Sequence[Piece], weight: Tensor, weights: Mapping[str, float], compute: Compute
) -> Iterator[list[float]]:
    norms = {n: _norm(n, same[0], weight) for n in weights if n != "subspace"}
    total = math.fsum(share * norms[name] for name, share in weights.items() if name in norms)
    share = weights.get("subspace")
    for piece in same:
        along = [0.0] if share is None else (share * _along(piece, weight, compute)).tolist()
        yield [total + value for value in along]


def _layer(one: tuple[int, Piece]) -> tuple[str, tuple[int, ...]]:
    return one[1].module, one[1].shape


def weight_under(model: Model, piece: Piece) -> Tensor:
    """Read the weight that a piece changes, [out, in · kh · kw] in fp32.

    Of a first layer that has more inputs in the model only those that the LoRA knows.
    """
    weight, shape = model.weight(piece.module), model.shape(piece.module)
    if flat(shape) == flat(piece.shape):
        return weight
    return weight.reshape(shape)[:, : piece.shape[1]].flatten(1)


def _size(piece: Piece, weight: Tensor) -> float:
    try:
        return frobenius(weight)
    except NumericsError as error:
        raise NumericsError(f"{piece.module} {error}.") from None


def _norm(name: str, piece: Piece, weight: Tensor) -> float:
    size = _size(piece, weight)
    if name == "spn-ckpt":
        size = spectral(weight, frobenius=size, seed_name=piece.module).value
    return _log(size)


def _log(size: float) -> float:
    return math.log10(size) if size else -math.inf


def _along(piece: Piece, weight: Tensor, compute: Compute) -> Tensor:
    """Return log10 |uᵢᵀ W vᵢ| of every direction, [k] in fp64 on the CPU.

    What is below the rounding of fp32 counts as that; where W is zero it is −∞.
    """
    size = _size(piece, weight)
    found = all_directions(piece, compute=compute)
    seen = (weight @ found.v.to(weight)).cpu().double()
    along = (found.u.double() * seen).sum(0).abs()
    return along.clamp(min=_ROUNDING * size).log10()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Once:
    """A source that reads each tensor once and keeps it: q, k and v may lie in one."""

    base: TensorSource
    held: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.base.specs

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.base.metadata

    def get(self, key: str) -> Tensor:
        if key not in self.held:
            self.held[key] = self.base.get(key)
        return self.held[key]

    def extent(self, key: str) -> Extent | None:
        return self.base.extent(key)
