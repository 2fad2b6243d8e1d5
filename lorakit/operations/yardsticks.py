"""What a LoRA's directions are measured by, and which of its layers have no measure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorakit.compute import Compute
from lorakit.errors import SpecError, UnmatchedError
from lorakit.linalg.ranks import RankRule, Scorer
from lorakit.lorafile import LoraFile
from lorakit.models import Model
from lorakit.operations.pieces import Piece
from lorakit.operations.scores import DEFAULT, measured, needs_model, parse_score
from lorakit.operations.stack import check_architecture
from lorakit.progress import Progress
from lorakit.report import name_some

_BY_SPECTRUM = ("energy", "error", "sv_ratio", "sv_sum")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Yardstick:
    """What one LoRA's directions are measured by.

    Args:
        score: as the user said it.
        against: the model's name, None where the score needs none.
        references: module -> log10 of what of the reference hangs on the model: one number, or
            one a direction, [k].
        unmatched: the layers that the model lacks.
    """

    score: str
    against: str | None = None
    references: Mapping[str, Tensor] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def zero(self) -> tuple[str, ...]:
        """The layers whose weight in the model is zero: any change is infinitely large there."""
        known = self.references.items()
        return tuple(module for module, found in known if not bool(found.isfinite().all()))

    def notes(self, rule: RankRule) -> tuple[str, ...]:
        """Say how the layers were treated that have no score."""
        found = []
        if self.unmatched:
            how = (
                "by the mean of the other layers' references"
                if rule.size is not None
                else "by --rank alone"
            )
            found.append(
                f"{len(self.unmatched)} layers are not in {self.against} and have no score "
                f"({name_some(self.unmatched)}); they were cut {how}."
            )
        if self.zero:
            found.append(
                f"{len(self.zero)} layers of {self.against} are zero ({name_some(self.zero)}), so "
                "that any change of them has the highest score."
            )
        return tuple(found)


def chosen_score(score: str | None, rule: RankRule, *, against: bool) -> str | None:
    """Return what directions are measured by, None where they are not.

    Args:
        score: "spn-ckpt": ‖W‖₂ of the model's layer; "fro-ckpt": ‖W‖; "subspace": |uᵀ W v| of the
            direction; "spn-lora": σ₁ of the LoRA's layer; "fro-lora": ‖ΔW‖. Or several with
            weights: "fro-ckpt=0.8,spn-lora=0.2". If left out "fro-ckpt" where there is a model and
            the rule is a threshold or a size.
        rule: the rank rule.
        against: whether there is a model.

    Raises:
        SpecError: a threshold without a score, a score without its model or beside a rule that
            goes by the spectrum alone.
    """
    if score is None:
        if rule.threshold is not None and not against:
            raise SpecError(
                "A threshold needs a score; name the model with --against, or give --score "
                "spn-lora or fro-lora."
            )
        wanted = rule.threshold is not None or rule.size is not None
        return DEFAULT if against and wanted else None
    spectral = [name for name in _BY_SPECTRUM if getattr(rule, name) is not None]
    if spectral:
        raise SpecError(
            f"--{spectral[0].replace('_', '-')} goes by the singular values alone and takes no "
            "score; give --threshold, --size or --rank with --score."
        )
    check_model(score, against=against)
    return score


def is_directional(score: str) -> bool:
    """Tell whether a score looks at the directions themselves, not at singular values alone."""
    return "subspace" in parse_score(score)


def check_model(score: str, *, against: bool) -> None:
    """Check that a score has the model that it is relative to.

    Raises:
        SpecError: it has not, or the score is unknown.
    """
    if needs_model(score) and not against:
        raise SpecError(
            f"The score {score} is relative to a model's weights; name the model with --against."
        )


def taken(
    loras: Sequence[tuple[LoraFile, Sequence[Piece]]],
    *,
    score: str,
    model: Model | None,
    allow_unmatched: bool,
    compute: Compute,
    progress: Progress,
) -> tuple[Yardstick, ...]:
    """Take the measure of a model for several LoRAs, which are read together.

    Raises:
        UnmatchedError: the model lacks a layer.
        AdapterError: the model is of another architecture.
    """
    absent = [
        check_matched(lora, pieces, model, score=score, allowed=allow_unmatched)
        for lora, pieces in loras
    ]
    if model is None or not needs_model(score):
        return tuple(Yardstick(score=score) for _ in loras)
    found = measured(
        [pieces for _, pieces in loras],
        score=score,
        model=model,
        compute=compute,
        progress=progress,
    )
    return tuple(
        Yardstick(score=score, against=model.source.name, references=references, unmatched=lacking)
        for references, lacking in zip(found, absent, strict=True)
    )


def check_matched(
    lora: LoraFile,
    pieces: Sequence[Piece],
    model: Model | None,
    *,
    score: str | None,
    allowed: bool,
) -> tuple[str, ...]:
    """Return the layers that the model lacks, so that they have no score.

    Raises:
        UnmatchedError: there are some and they are not allowed, or the model has none of them.
        AdapterError: the model is of another architecture.
    """
    if model is None or score is None or not needs_model(score):
        return ()
    layers = [piece.module for piece in pieces if not piece.vector]
    absent = tuple(module for module in layers if not model.parts(module))
    if not absent or (allowed and len(absent) < len(layers)):
        return absent
    check_architecture(model, [(lora, 1.0)])
    name = model.source.name
    if len(absent) == len(layers):
        raise UnmatchedError(
            f"{name}: none of the layers of {lora.name} has a place in this model "
            f"({name_some(absent)}); is it the right model?"
        )
    raise UnmatchedError(
        f"{name}: {len(absent)} layers of {lora.name} have no place in this model and so no score: "
        f"{name_some(absent)}; use --allow-unmatched to cut them without one."
    )


def scored(
    pieces: Sequence[Piece], yardstick: Yardstick, *, rule: RankRule, rescale: float
) -> list[Piece]:
    """Return the pieces with what their directions are measured by; biases and norms have none.

    A layer that the model lacks reaches any threshold, so that a cap alone cuts it; of a size it
    gets a share by the mean of the other layers' references.
    """
    weights = parse_score(yardstick.score)
    absent = _absent(yardstick, rule)
    return [
        piece
        if piece.vector
        else replace(
            piece,
            scorer=Scorer(
                reference=yardstick.references.get(piece.module, absent),
                of_largest=weights.get("spn-lora", 0.0),
                of_norm=weights.get("fro-lora", 0.0),
                rescale=rescale,
            ),
        )
        for piece in pieces
    ]


def _absent(yardstick: Yardstick, rule: RankRule) -> Tensor:
    """Return the reference of a layer that has none."""
    if yardstick.against is None:
        return torch.tensor(0.0, dtype=torch.float64)
    if rule.size is None:
        return torch.tensor(-math.inf, dtype=torch.float64)
    known = [r.mean() for r in yardstick.references.values() if bool(r.isfinite().all())]
    return torch.stack(known).mean() if known else torch.tensor(0.0, dtype=torch.float64)
