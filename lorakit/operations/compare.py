"""compare: how the ΔW of several LoRAs lie to each other, from their factors alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.compute import Compute, ordered_map
from lorakit.errors import AdapterError, SpecError, UnmatchedError
from lorakit.fusing import as_named, is_split, split
from lorakit.linalg.dense import svd_for_rule, truncated_svd
from lorakit.linalg.factored import Factors, decomposed, numerical_rank, scaled
from lorakit.linalg.overlap import Angles, angles
from lorakit.linalg.ranks import RankRule, choose_rank
from lorakit.linalg.tiles import dense
from lorakit.lorafile import LoraFile
from lorakit.methods.conflict import sampled_conflict
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.models import Model, open_model
from lorakit.operations.comparison import Comparison
from lorakit.operations.stack import Stack, architecture_of, flat, with_kernel
from lorakit.operations.strength import Strength, strength_at
from lorakit.operations.tally import Layer, Subject, summed
from lorakit.progress import Progress, silent
from lorakit.tensorfile.source import TensorSource

LEADING = 64
"""Of a ΔW that is no product of factors, so many directions are compared."""


def compare(
    stack: Stack,
    *,
    rule: RankRule | None = None,
    against: TensorSource | None = None,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare LoRAs at their strengths: norms, angles, shared directions, conflicts of sign.

    What is compared is s · ΔW; a layer that a LoRA lacks counts as zero in it. Norms, cosines,
    distances and the energy that a rank keeps are exact, from the factors; so are overlaps, but
    for ΔW without factors, of which 64 leading directions are taken. Conflicts are counted on at
    most 65,536 elements of a layer, always the same ones.

    Args:
        stack: (LoRA, strength) pairs, two or more.
        rule: a rank rule; the comparison tells what it keeps of the plain sum.
        against: the model that DoRA and its likes are taken on.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Raises:
        SpecError: there are less than two LoRAs.
        AdapterError: they are for different models, or one needs a model to be taken on.
        UnmatchedError: every strength is zero.
    """
    if len(stack) < 2:
        raise SpecError(f"compare needs two LoRAs or more, found {len(stack)}; name another one.")
    architecture_of(stack)
    compute = compute or Compute.of()
    named = _in_one_dialect(stack)
    work = _Work(
        stack=named,
        model=None if against is None else open_model(against),
        rule=rule,
        device=compute.torch_device,
    )
    modules = work.modules()
    layers = []
    for layer in ordered_map(work.measured, modules, compute=compute, cost=work.cost):
        layers.append(layer)
        progress("layers", len(layers), len(modules))
    shared = set.intersection(*(set(lora.adapters) for lora, _ in named))
    return summed(
        Subject(
            kind="loras",
            names=tuple(lora.name for lora, _ in stack),
            alone=tuple(len(lora.adapters.keys() - shared) for lora, _ in named),
            order=named[0][0].blocks.blocks,
        ),
        layers,
    )


def _in_one_dialect(stack: Stack) -> Stack:
    """Where one LoRA names the parts of a layer that another names whole, cut both into parts."""
    if any(is_split(lora) for lora, _ in stack):
        return [(split(lora), strength) for lora, strength in stack]
    return [(as_named(lora, stack[0][0].dialect), strength) for lora, strength in stack]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """What a layer is measured with."""

    stack: Stack
    model: Model | None
    rule: RankRule | None
    device: torch.device

    def modules(self) -> list[str]:
        """Return the modules that some LoRA changes at its strength.

        Raises:
            UnmatchedError: there is none.
        """
        found = {
            module
            for lora, strength in self.stack
            for module in lora.adapters
            if strength_at(strength, lora, module)
        }
        if not found:
            raise UnmatchedError(
                "Every strength is zero, so nothing is left to compare; give each LoRA a strength."
            )
        return sorted(found)

    def cost(self, module: str) -> int:
        """Return the bytes that a layer takes while it is measured."""
        adapters = [lora.adapters.get(module) for lora, _ in self.stack]
        return sum(_bytes(adapter) for adapter in adapters if adapter is not None)

    def measured(self, module: str) -> Layer:
        """Measure one layer."""
        found = [self._delta(lora, strength, module) for lora, strength in self.stack]
        there = [delta for delta in found if delta is not None]
        shapes = dict.fromkeys(delta.shape for delta in there)
        if len(shapes) > 1:
            raise AdapterError(
                f"{module} has changes of shapes {' and '.join(str(list(s)) for s in shapes)}; "
                "these LoRAs are for different models."
            )
        rows, columns = there[0].shape
        nothing = Factors(up=torch.zeros(rows, 0), down=torch.zeros(0, columns))
        deltas = [delta or Delta(change=nothing, strength=0.0) for delta in found]
        lora = next(lora for lora, _ in self.stack if module in lora.adapters)
        layer = Layer(
            module=module,
            block=lora.block(module),
            angles=_angles(deltas, self.device, module),
            conflict=sampled_conflict(deltas),
        )
        if self.rule is None:
            return layer
        conv = math.prod(with_kernel(module, lora.adapters[module].shape)[2:]) > 1
        kept, whole = _energy(linear(there), self.rule, conv=conv, module=module)
        return replace(layer, kept=kept, whole=whole)

    def _delta(self, lora: LoraFile, strength: float | Strength, module: str) -> Delta | None:
        adapter = lora.adapters.get(module)
        at = 0.0 if adapter is None else strength_at(strength, lora, module)
        if adapter is None or not at:
            return None
        if not adapter.needs_base:
            return Delta(change=adapter.change(), strength=at)
        if self.model is None:
            raise AdapterError(
                f"{lora.name}: {module} is {adapter.kind}, whose change depends on the weight that "
                "it changes; name the model with --against."
            )
        if not self.model.parts(module):
            raise UnmatchedError(
                f"{self.model.source.name}: expected a weight of {module}, which is "
                f"{adapter.kind}, found none; name the model that the LoRA was trained on."
            )
        return Delta(change=adapter.change(self.model.weight(module)), strength=at)


def _angles(deltas: Sequence[Delta], device: torch.device, module: str) -> Angles:
    """Measure how ΔW at their strengths lie to each other."""
    parts = [_leading(delta, module) for delta in deltas]
    found = angles(parts, device=device)
    if all(isinstance(delta.change, Factors) for delta in deltas):
        return found
    whole = [_whole(delta) for delta in deltas]
    gram = torch.stack([torch.stack([(one * other).sum() for other in whole]) for one in whole])
    apart = torch.zeros_like(gram)
    for i, j in combinations(range(len(whole)), 2):
        apart[i, j] = apart[j, i] = (whole[i] - whole[j]).square().sum()
    return replace(found, gram=gram, apart=apart)


def _leading(delta: Delta, module: str) -> Factors:
    change = delta.change
    if isinstance(change, Factors):
        wide = Factors(up=change.up.double(), down=change.down)
        return scaled(wide, delta.strength)
    found = truncated_svd(change.float(), rank=LEADING, seed_name=module)
    return Factors(up=found.u.double() * found.s, down=found.v.double().T)


def _whole(delta: Delta) -> Tensor:
    return dense(delta.change).double() * delta.strength


def _energy(
    change: Factors | Tensor, rule: RankRule, *, conv: bool, module: str
) -> tuple[float, float]:
    """Return the energy that a rank rule keeps of a ΔW, and all of it."""
    if isinstance(change, Factors):
        values = decomposed(change).s
        values = values[: numerical_rank(values, change.shape)]
        whole = float(values.square().sum())
    else:
        found = svd_for_rule(change.float(), rule, conv=conv, seed_name=module)
        values, whole = found.s, found.energy_total
    kept = values[: choose_rank(values, rule, conv=conv, energy_total=whole)]
    return float(kept.square().sum()), whole


def _bytes(adapter: Adapter) -> int:
    """Return what a ΔW takes in fp64 with room to work on it; of a base too, where one is read."""
    rows, columns = flat(adapter.shape)
    rank = adapter.rank if adapter.kind in ("lora", "locon") else None
    return 24 * (rows * columns if rank is None else (rows + columns) * rank)
