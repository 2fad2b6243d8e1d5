"""What inspect measures, against dense float64 SVDs of what the layers change."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import lorakit
from lorakit.models import open_model
from lorakit.names.kinds import kind_of
from lorakit.operations.apply import apply
from lorakit.operations.inspect import inspect
from lorakit.operations.inspection import Group, Inspection
from tests import reference
from tests.helpers import dense, ran, tensors_of
from tests.oracle.test_mixed_kinds import FOLDER, mixed, random

FP64 = 1e-9
"""Factors and matrices in fp64, with a Gram matrix of well-conditioned factors in between."""


@pytest.fixture(scope="module")
def conv_lora(make_lora) -> Path:  # type: ignore[no-untyped-def]
    path: Path = make_lora("sd1", rank=5, alpha=3, conv=True)
    return path


def stats(deltas: Iterable[Tensor], whole: float) -> list[float]:
    """Return norm, share of the energy and mean of ‖ΔW‖² / σ₁² of some layers, from dense SVDs."""
    spectra = [torch.linalg.svdvals(delta.double().flatten(1)) ** 2 for delta in deltas]
    energy = math.fsum(float(s.sum()) for s in spectra)
    alive = [float(s.sum() / s[0]) for s in spectra if float(s[0])]
    return [math.sqrt(energy), energy / whole, math.fsum(alive) / len(alive)]


def told(group: Group) -> list[float]:
    found = (group.norm, group.share, group.effective_rank)
    return [value for value in found if value is not None]


def groups(found: Inspection, deltas: Mapping[str, Tensor]) -> dict[str, tuple[Group, list[str]]]:
    """Return every group of an inspection, and the modules that are in it."""
    lora = lorakit.load_lora(found.path)
    blocks = {module: lora.block(module) for module in deltas}
    named = {g.id: (g, [m for m in deltas if blocks[m] == g.id]) for g in found.blocks}
    named |= {g.id: (g, [m for m in deltas if kind_of(m) == g.id]) for g in found.kinds}
    for block, inside in found.cells.items():
        for g in inside:
            modules = [m for m in deltas if (blocks[m], kind_of(m)) == (block, g.id)]
            named[f"{block} {g.id}"] = (g, modules)
    return named


def test_norms_shares_and_effective_ranks_are_those_of_the_dense_matrices(conv_lora: Path) -> None:
    found, deltas = inspect(conv_lora, blocks=True), dense(conv_lora)
    whole = math.fsum(float(delta.norm()) ** 2 for delta in deltas.values())
    every = groups(found, deltas)
    assert len(every) > 80
    assert all(group.layers == len(modules) for group, modules in every.values())
    ours = torch.tensor([told(group) for group, _ in every.values()])
    exact = torch.tensor(
        [stats((deltas[m] for m in modules), whole) for _, modules in every.values()]
    )

    def check(answer: Tensor) -> None:
        assert_close(ours, answer, rtol=FP64, atol=0.0)

    reference.negative_control(check, exact)
    assert found.norm == pytest.approx(math.sqrt(whole), rel=FP64)


def kept_by(deltas: Iterable[Tensor], rank: int) -> float:
    """Return the energy that the best matrices of a rank keep of these, from dense SVDs."""
    pairs = [(delta, reference.best_rank(delta, rank)) for delta in deltas]
    lost = math.fsum(float((delta - best).norm()) ** 2 for delta, best in pairs)
    return 1 - lost / math.fsum(float(delta.norm()) ** 2 for delta, _ in pairs)


def test_the_spectrum_is_what_the_best_matrices_of_each_rank_keep(conv_lora: Path) -> None:
    found, deltas = inspect(conv_lora, spectrum=True).spectrum, dense(conv_lora)
    assert found is not None and found.ranks == (1, 2, 3, 4, 5)
    lora = lorakit.load_lora(conv_lora)
    for curve in (*found.blocks, found.total):
        inside = [d for m, d in deltas.items() if curve.id in ("all", lora.block(m))]
        exact = torch.tensor([kept_by(inside, rank) for rank in found.ranks], dtype=torch.float64)
        ours = torch.tensor(curve.kept, dtype=torch.float64)

        def check(answer: Tensor, ours: Tensor = ours) -> None:
            assert_close(ours, answer, rtol=0.0, atol=1e-9)

        reference.negative_control(check, exact)
        for goal, rank in curve.needed.items():
            share = float(goal) / 100
            assert exact[rank - 1] >= share - FP64
            assert rank == 1 or exact[rank - 2] < share


def test_the_advice_is_what_resize_then_does(conv_lora: Path, tmp_path: Path) -> None:
    found = inspect(conv_lora, spectrum=True).spectrum
    assert found is not None
    for goal, rank in found.total.needed.items():
        out = tmp_path / f"{goal}.safetensors"
        kept = ran("resize", conv_lora, "--rank", rank, "-o", out)["totals"]["energy"]
        assert kept == pytest.approx(found.total.kept[rank - 1], rel=1e-6)
        assert kept >= float(goal) / 100


def test_the_change_relative_to_the_model_is_by_norms(
    sd15: Path, sd15_folder: Path, conv_lora: Path
) -> None:
    deltas, weights = dense(conv_lora), {}
    for file in sd15_folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                module = f"{file.parent.name}.{key.removesuffix('.weight')}"
                weights[module] = opened.get_tensor(key).double()
    found = inspect(conv_lora, against=lorakit.open_source(sd15))
    every = groups(found, deltas)
    ours = torch.tensor([group.relative for group, _ in every.values()], dtype=torch.float64)
    exact = torch.tensor(
        [
            math.hypot(*(float(deltas[m].norm()) for m in modules))
            / math.hypot(*(float(weights[m].norm()) for m in modules))
            for _, modules in every.values()
        ],
        dtype=torch.float64,
    )

    def check(answer: Tensor) -> None:
        assert_close(ours, answer, rtol=FP64, atol=0.0)

    reference.negative_control(check, exact)
    assert found.unmatched == () and found.against == str(sd15)


@pytest.fixture
def mixed_file(tmp_path: Path) -> Path:
    """Return a file with a LoRA, LoHa, LoKr, DoRA, OFT, IA3, full differences, a norm, a bias."""
    path = tmp_path / "mixed.safetensors"
    save_file(mixed(), path)
    return path


def test_every_kind_of_adapter_is_measured(mixed_file: Path) -> None:
    """The model that it is baked into, minus the model, is what each layer changes."""
    lora = lorakit.load_lora(mixed_file)
    baked, _ = apply(FOLDER, [(lora, 1.0)])
    model = open_model(FOLDER)
    deltas = {}
    for module in lora.adapters:
        slot = model.slot(module)
        assert slot is not None
        deltas[module] = (baked.exact(slot.key) - FOLDER.get(slot.key).double()).reshape(
            slot.shape[0], -1
        )
    found = inspect(mixed_file, blocks=True, spectrum=True, against=FOLDER)
    whole = math.fsum(float(delta.norm()) ** 2 for delta in deltas.values())
    assert found.unmeasured == () and found.norm == pytest.approx(math.sqrt(whole), rel=1e-6)
    for group, modules in groups(found, deltas).values():
        assert told(group) == pytest.approx(stats((deltas[m] for m in modules), whole), rel=1e-6)
    ranked = {m: d for m, d in deltas.items() if len(lora.adapters[m].shape) > 1}
    assert len(ranked) == len(deltas) - 2
    fixed = whole - math.fsum(float(delta.norm()) ** 2 for delta in ranked.values())
    assert found.spectrum is not None
    for rank, kept in zip(found.spectrum.ranks, found.spectrum.total.kept, strict=True):
        exact = (fixed + kept_by(ranked.values(), rank) * (whole - fixed)) / whole
        assert kept == pytest.approx(exact, rel=1e-6), "a norm and a bias are kept whole"


def test_without_the_model_some_kinds_cannot_be_measured(mixed_file: Path) -> None:
    found = inspect(mixed_file, blocks=True)
    lora = lorakit.load_lora(mixed_file)
    assert found.unmeasured == tuple(m for m, a in lora.adapters.items() if a.needs_base)
    assert len(found.unmeasured) == 3
    assert math.fsum(block.share or 0.0 for block in found.blocks) == pytest.approx(1.0)


def test_nothing_depends_on_how_the_factors_are_scaled(conv_lora: Path, tmp_path: Path) -> None:
    tensors = tensors_of(conv_lora)
    other = {
        key: value.float() * (1000.0 if "lora_up" in key else 0.001 if "lora_down" in key else 1.0)
        for key, value in tensors.items()
    }
    save_file(other, tmp_path / "other.safetensors")
    one, two = (
        inspect(path, blocks=True, spectrum=True)
        for path in (conv_lora, tmp_path / "other.safetensors")
    )
    assert one.spectrum is not None and two.spectrum is not None
    assert two.spectrum.total.kept == pytest.approx(one.spectrum.total.kept, rel=1e-6)
    for first, second in zip(one.blocks, two.blocks, strict=True):
        assert told(second) == pytest.approx(told(first), rel=1e-6)


def test_a_large_rank_has_a_short_curve_and_an_exact_goal(tmp_path: Path) -> None:
    """A full difference has as many directions as its smaller side."""
    change = random(300, 400, seed=1)
    path = tmp_path / "full.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.diff": change}, path)
    found = inspect(path, spectrum=True).spectrum
    assert found is not None and found.ranks[-1] == 300 and len(found.ranks) < 100
    sums = (torch.linalg.svdvals(change.double()) ** 2).cumsum(0)
    for goal, rank in found.total.needed.items():
        assert rank == int((sums < float(goal) / 100 * sums[-1]).sum()) + 1
