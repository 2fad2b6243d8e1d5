"""What inspect finds: plain values, which become JSON as they are."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.report import SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers of a LoRA together: a block, a kind, or a kind in a block.

    `norm` and what follows it are None where the tensors were not read, or none of the layers can
    be measured. `share` is the part of Σ‖ΔW‖² over the whole LoRA; `effective_rank` is
    ‖ΔW‖² / σ₁², the mean over layers; `relative` is ‖ΔW‖ / ‖W‖, known where a model was named.
    """

    id: str
    layers: int
    parameters: int
    norm: float | None = None
    share: float | None = None
    effective_rank: float | None = None
    dead: int = 0
    relative: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The share of Σσ² that some layers keep when each is cut to a rank.

    Args:
        id: the block, or `all`.
        rank: the largest that a layer has.
        needed: per cent -> the smallest rank that keeps as much; 0 where there is nothing to keep.
        kept: the share at each of the spectrum's ranks.
    """

    id: str
    rank: int
    needed: Mapping[str, int]
    kept: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Energy kept against rank, in each block and in total.

    Biases and norms have no rank and count as kept. `ranks` are all up to 64, then fewer.
    """

    ranks: tuple[int, ...]
    total: Curve
    blocks: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a file holds; counts map a value to how many layers or tensors have it.

    `cells` are the kinds in each block, `norm` is ‖ΔW‖ of the whole LoRA. `unmeasured` are layers
    without a norm, because their change depends on the model, and `not_finite` those that hold NaN
    or infinity; `unmatched` have no place in the model `against`. `faults` are sentences, known
    where the tensors were read.
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
    blocks: tuple[Group, ...] = ()
    kinds: tuple[Group, ...] = ()
    cells: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)
    norm: float | None = None
    dead: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    unclaimed: tuple[str, ...] = ()
    faults: tuple[str, ...] | None = None
    spectrum: Spectrum | None = None
    against: str | None = None
    unmatched: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"schema": SCHEMA, "command": "inspect", **asdict(self)}
