"""extract: the LoRA that turns one model into another."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorakit.adapters import is_vector
from lorakit.compute import Compute
from lorakit.errors import AdapterError, NumericsError, UnmatchedError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.models import Model, open_model
from lorakit.names.blocks import block_of
from lorakit.names.checkpoints import BIAS
from lorakit.names.dialects import joins
from lorakit.operations.choice import Choice
from lorakit.operations.lost import with_lost_changes
from lorakit.operations.outcome import from_pieces
from lorakit.operations.pieces import Piece
from lorakit.operations.stack import flat
from lorakit.progress import Progress, silent
from lorakit.report import Report, name_some
from lorakit.tensorfile.source import TensorSource

DEFAULT_RULE = RankRule(rank=32, conv_rank=16)


def extract(
    original: TensorSource,
    tuned: TensorSource,
    *,
    rule: RankRule | None = None,
    choice: Choice | None = None,
    alpha: float | None = None,
    dialect: str = "kohya",
    allow_unmatched: bool = False,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[LoraFile, Report]:
    """Extract ΔW = tuned − original as a LoRA, a layer in memory at a time.

    The difference is taken in fp32 whatever the files hold, and nothing is clamped.

    Args:
        original: the model to start from; any source, also one that `apply` made.
        tuned: the model to arrive at.
        rule: how much to keep; without one rank 32, and 16 for kernels over 1x1.
        choice: which layers, how they are decomposed, and the dtype to be stored.
        alpha: what to store as alpha, ΔW unchanged; None for the rank.
        dialect: the names to write.
        allow_unmatched: leave out layers that only one of the models has.
        compute: device, workers, bytes in flight.
        progress: called with (what, done, total).

    Returns:
        The LoRA, and the report: what was kept of each layer, and what no
        LoRA can hold (norms, biases, embeddings) with its share of the change.

    Raises:
        AdapterError: the models are of different architectures.
        UnmatchedError: the models are equal, or a layer is missing in one.
        NumericsError: a weight holds NaN or infinity.

    Source: kohya's `extract_lora_from_models.py`, without its clamp at the 0.99 quantile, its
    threshold on text encoders and its difference in half precision.
    """
    choice = Choice() if choice is None else choice
    compute = compute or Compute.of()
    models = open_model(original), open_model(tuned)
    pieces, unmatched = extract_pieces(
        *models, choice=choice, dialect=dialect, allow_unmatched=allow_unmatched
    )
    try:
        lora, report = from_pieces(
            pieces,
            command="extract",
            rule=DEFAULT_RULE if rule is None else rule,
            like=LoraFile(
                name="extract",
                adapters={},
                architecture=models[1].index.architecture,
                dialect=dialect,
                dtype=choice.dtype,
            ),
            alpha=alpha,
            choice=choice,
            compute=compute,
            progress=progress,
        )
    except NumericsError as error:
        raise NumericsError(
            f"{tuned.name} less {original.name}: {error}: lorakit verify names all such tensors."
        ) from None
    report = replace(report, unmatched=unmatched)
    return lora, with_lost_changes(
        report, *models, choice=choice, compute=compute, progress=progress
    )


def extract_pieces(
    original: Model,
    tuned: Model,
    *,
    choice: Choice,
    dialect: str = "kohya",
    allow_unmatched: bool = False,
) -> tuple[list[Piece], tuple[str, ...]]:
    """Return a piece a chosen module of tuned − original, and the modules only one of them has.

    The modules are those that the dialect names: fused, as the single file has them, or not.
    """
    _check_architectures(original, tuned)
    modules, unmatched = _shared_modules(original, tuned, choice, dialect, allow_unmatched)
    pieces = [
        _piece(original, tuned, module, choice)
        for module in modules
        if choice.convs or choice.kind == "full" or math.prod(tuned.shape(module)[2:]) == 1
    ]
    return pieces, unmatched


def _check_architectures(original: Model, tuned: Model) -> None:
    ours, theirs = original.index.architecture, tuned.index.architecture
    if ours is not None and theirs is not None and ours.kin != theirs.kin:
        raise AdapterError(
            f"{tuned.source.name}: expected a model for {ours.title} as {original.source.name} "
            f"is, found {theirs.title}; only models of one architecture can be subtracted."
        )


def _named(model: Model, kind: str, dialect: str) -> frozenset[str]:
    """Return what a LoRA of a kind can change in a model, under the names of a dialect."""
    found = set(model.index.layers)
    architecture = model.index.architecture
    if architecture is not None and joins(dialect, architecture):
        for whole, members in architecture.fused.items():
            parts = {part for part, _ in members}
            if parts <= found and architecture.original_fused(whole):
                found = (found - parts) | {whole}
    if kind != "full":
        return frozenset(found)
    norms = {module for module in model.index.targets if is_vector(model.shape(module))}
    biases = {module + BIAS for module in found | norms if model.parts(module + BIAS)}
    return frozenset(found | norms | biases)


def _shared_modules(
    original: Model, tuned: Model, choice: Choice, dialect: str, allow_unmatched: bool
) -> tuple[list[str], tuple[str, ...]]:
    architecture = tuned.index.architecture
    ours, theirs = (_named(model, choice.kind, dialect) for model in (original, tuned))
    chosen = [m for m in sorted(ours | theirs) if choice.takes(m, block_of(m, architecture))]
    shared = [module for module in chosen if module in ours and module in theirs]
    for module in shared:
        _check_shapes(original, tuned, module)
    both = original.index, tuned.index
    single = tuple(
        module
        for module in chosen
        if (module in ours) != (module in theirs)
        and all(index.has_component(module.partition(".")[0]) for index in both)
    )
    if not shared:
        raise UnmatchedError(
            f"{tuned.source.name}: none of the chosen layers is in it and in "
            f"{original.source.name}; give two models of one architecture."
        )
    if single and not allow_unmatched:
        raise UnmatchedError(
            f"{tuned.source.name}: {len(single)} layers are in only one of the models: "
            f"{name_some(single)}; use --allow-unmatched to leave them out."
        )
    return shared, single


def _check_shapes(original: Model, tuned: Model, module: str) -> None:
    first, second = original.shape(module), tuned.shape(module)
    if flat(first) != flat(second):
        raise AdapterError(
            f"{tuned.source.name}: {module} expected {list(first)} as in "
            f"{original.source.name}, found {list(second)}; use --exclude to leave it out."
        )


def _bytes_an_element(original: Model, tuned: Model, module: str, choice: Choice) -> int:
    """Return what making a difference takes: itself, and both weights if they are read whole."""
    if choice.kind == "dora":
        return 60
    streamed = original.streams(module) and tuned.streams(module)
    return 4 if streamed and not choice.min_change else 16


def _piece(original: Model, tuned: Model, module: str, choice: Choice) -> Piece:
    shape = tuned.shape(module)
    rows, columns = flat(shape)

    def write(room: Tensor) -> None:
        tuned.difference(module, original, room)
        if choice.min_change:
            floor = choice.min_change * float(original.weight(module).norm())
            if float(room.norm()) < floor:
                room.zero_()

    def truth() -> Tensor:
        room = torch.empty(rows, columns)
        write(room)
        return room

    return Piece(
        module=module,
        block=block_of(module, tuned.index.architecture),
        shape=shape,
        truth=truth,
        write=write,
        base=partial(original.weight, module) if choice.kind == "dora" else None,
        rank_bound=min(rows, columns),
        place=tuned.place(module),
        cost=_bytes_an_element(original, tuned, module, choice) * rows * columns,
    )
