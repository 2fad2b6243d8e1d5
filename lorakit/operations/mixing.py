"""How the adapters that several LoRAs have of one module become one ΔW."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.errors import SpecError
from lorakit.linalg.ranks import RankRule
from lorakit.linalg.tiles import Change
from lorakit.methods.cuts import model_cuts
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.methods.method import LINEAR, Method
from lorakit.methods.strengths import divisor
from lorakit.methods.table import combine, narrowed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One LoRA's adapter of a module, its strength there, and what names the LoRA's masks."""

    adapter: Adapter
    strength: float
    owner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mix:
    """A method with every parameter set, and what it has to know beyond one module.

    Args:
        method: see `Method.filled`.
        rule: the rank rule of the LoRA that is written, None where a model is.
        cuts: owner -> the magnitude below which elements of the whole model are trimmed.
    """

    method: Method = LINEAR
    rule: RankRule | None = None
    cuts: Mapping[str, float] = field(default_factory=dict)

    def of(
        self, module: str, parts: Sequence[Part], base: Tensor | None = None, *, conv: bool = False
    ) -> Change:
        """Combine one module's adapters.

        Args:
            module: the canonical name.
            parts: the adapters and their strengths.
            base: the weight [out, in · kh · kw] in fp32, where a part needs it.
            conv: whether the kernel is over 1x1.
        """
        deltas = deltas_of(parts, base)
        if self.method.plain:
            return linear(deltas)
        rank = None if self.rule is None else self.rule.cap(conv)
        return combine(deltas, self.method, module=module, rank=rank, cuts=self.cuts)

    def factor(self, parts: Sequence[Part]) -> float:
        """Return what strength · ΔW, and its rounding, is multiplied by whatever the method."""
        if not self.method.normalize:
            return abs(self.method.lambda_)
        return abs(self.method.lambda_ / divisor(self.method, [p.strength for p in parts]))

    @property
    def dense(self) -> bool:
        """Whether even factors become a matrix."""
        return self.method.entry.family == "elementwise" and self.method.space == "full"


def mix_of(
    method: Method,
    modules: Mapping[str, Sequence[Part]],
    *,
    rule: RankRule | None = None,
) -> Mix:
    """Return how the modules of a stack are combined, and look at all of them where that counts.

    Args:
        method: as the user said it.
        modules: module -> its parts.
        rule: the rank rule of the LoRA that is written, None where a model is.

    Raises:
        SpecError: the method does not fit the stack.
    """
    if method.plain:
        return Mix(rule=rule)
    method = method.filled(into_lora=rule is not None)
    uses = max((len(parts) for parts in modules.values()), default=0)
    if method.name == "slerp" and uses > 2:
        raise SpecError(f"slerp takes two LoRAs, found {uses}; use --method karcher for more.")
    cuts = _cuts(method, modules) if method.scope == "model" else {}
    return Mix(method=method, rule=rule, cuts=cuts)


def _cuts(method: Method, modules: Mapping[str, Sequence[Part]]) -> Mapping[str, float]:
    for module, parts in modules.items():
        if any(part.adapter.needs_base for part in parts):
            raise SpecError(
                f"{method.name} with scope model trims over all layers at once, found {module} "
                "whose change depends on the model; use --scope tensor."
            )
    # Header-only LoRAs of a dry run have no values.
    live = [parts for parts in modules.values() if parts and parts[0].owner]
    return model_cuts([partial(_narrow, parts) for parts in live], method.density or 1.0)


def _narrow(parts: Sequence[Part]) -> list[Delta]:
    return list(narrowed(deltas_of(parts)))


def deltas_of(parts: Sequence[Part], base: Tensor | None = None) -> list[Delta]:
    """Return each part's ΔW at strength 1."""
    return [
        Delta(change=part.adapter.change(base), strength=part.strength, owner=part.owner)
        for part in parts
    ]
