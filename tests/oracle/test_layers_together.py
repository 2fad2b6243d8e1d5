"""Layers of one shape taken together, as on a graphics card: the same results as one by one."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.compute import Compute
from lorakit.errors import NumericsError
from lorakit.linalg import dense
from lorakit.linalg.devices import Writer, filled, stacked
from lorakit.lorafile import LoraFile
from lorakit.operations import spectra
from lorakit.operations.pieces import Piece
from lorakit.report import Report
from tests import reference
from tests.helpers import slim

ALONE = Compute(threads=2)
TOGETHER = Compute(threads=2, together=8)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    layout = synthetic.single_file("sd1", factor=8)
    synthetic.write_checkpoint(folder / "a.safetensors", layout)
    synthetic.write_tuned(folder / "b.safetensors", layout, tuning=synthetic.Tuning(rank=12))
    slim(folder / "a.safetensors", folder / "b.safetensors", every=2)
    return folder / "a.safetensors", folder / "b.safetensors"


@pytest.fixture(scope="module")
def one_by_one(models: tuple[Path, Path]) -> tuple[LoraFile, Report]:
    return extracted(models, ALONE)


def on(device: str) -> Compute:
    chosen = Compute.of(device=device, threads=2)
    return TOGETHER if device == "cpu" else chosen


def extracted(models: tuple[Path, Path], compute: Compute) -> tuple[LoraFile, Report]:
    rule, choice = lorakit.RankRule(rank=8, conv_rank=4), lorakit.Choice(svd="fast")
    return lorakit.extract(
        *map(lorakit.open_source, models), rule=rule, choice=choice, compute=compute
    )


def check_same(found: tuple[LoraFile, Report], expected: tuple[LoraFile, Report]) -> None:
    """Compare ΔW, and the errors, which two approximations of one rank may differ in a little."""
    assert list(found[0].adapters) == list(expected[0].adapters)
    for row, other in zip(found[1].rows, expected[1].rows, strict=True):
        assert (row.module, row.rank_after) == (other.module, other.rank_after)
        assert row.error == pytest.approx(other.error, rel=5e-3, abs=1e-5), row.module
        assert row.norm == pytest.approx(other.norm, rel=1e-5), row.module


@pytest.mark.parametrize("device", DEVICES)
def test_models_are_extracted_as_well_as_layer_by_layer(
    models: tuple[Path, Path], one_by_one: tuple[LoraFile, Report], device: str
) -> None:
    check_same(extracted(models, on(device)), one_by_one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}, {"size": 300_000}], ids=str)
def test_a_lora_is_resized_to_the_same_changes(device: str, rule: dict[str, float]) -> None:
    lora = lorakit.load_lora(synthetic.lora_tensors("sd1", rank=8, conv=True, factor=8))
    chosen = lorakit.RankRule(**rule)  # type: ignore[arg-type]
    found, report = lorakit.resize(lora, rule=chosen, compute=on(device))
    expected, other = lorakit.resize(lora, rule=chosen, compute=ALONE)
    assert [row.rank_after for row in report.rows] == [row.rank_after for row in other.rows]
    for module, adapter in expected.adapters.items():
        exact = adapter.change().up @ adapter.change().down
        change = found.adapters[module].change()
        assert reference.relative_error(change.up @ change.down, exact) < 1e-5, module


def test_more_than_one_layer_is_taken_at_once_and_none_beyond_the_budget(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    solve = spectra.truncated_svds

    def counted(deltas: torch.Tensor, **options: object) -> list[dense.TruncatedSvd]:
        seen.append(deltas.shape)
        return solve(deltas, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(spectra, "truncated_svds", counted)
    extracted(models, TOGETHER)
    assert max(shape[0] for shape in seen) == 8
    seen.clear()
    budget = 2**22
    card = Compute(device="cpu:0", threads=2, together=8, memory=budget)
    extracted(models, card)
    assert all(shape[0] * shape[1] * shape[2] * 16 * 4 <= budget for shape in seen)


def test_on_a_cpu_the_budget_changes_no_bit(models: tuple[Path, Path]) -> None:
    wide, narrow = (
        extracted(models, Compute(threads=threads, together=4, memory=memory))[0]
        for threads, memory in ((1, 2**30), (3, 2**20))
    )
    for module, adapter in wide.adapters.items():
        for role, tensor in adapter.tensors().items():
            assert torch.equal(tensor, narrow.adapters[module].tensors()[role]), module


@pytest.mark.parametrize("room", [2, 0])
def test_a_card_without_room_takes_half_at_a_time_and_at_last_the_cpu_does_it(
    models: tuple[Path, Path],
    one_by_one: tuple[LoraFile, Report],
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def checked(count: int, device: torch.device) -> torch.device:
        # The CPU, which takes over in the end, is asked for by its plain name.
        if count > room and device == torch.device("cpu", 0):
            raise torch.OutOfMemoryError("no room")
        return torch.device("cpu")

    def one(matrices: Sequence[Tensor], device: torch.device) -> Tensor:
        return stacked(matrices, checked(len(matrices), device))

    def several(writers: Sequence[Writer], shape: tuple[int, int], device: torch.device) -> Tensor:
        return filled(writers, shape, checked(len(writers), device))

    monkeypatch.setattr(spectra, "stacked", one)
    monkeypatch.setattr(spectra, "filled", several)
    card = Compute(device="cpu:0", threads=2, together=8)
    found = extracted(models, card)
    check_same(found, one_by_one)
    notes = {row.note for row in found[1].rows if row.rank_after}
    assert any("decomposed on the CPU" in note for note in notes) == (room == 0)


def test_a_broken_layer_among_others_is_named() -> None:
    layout = synthetic.single_file("sd1", factor=16)
    one = {key: synthetic.weight(key, shape, seed=0) for key, shape in layout.items()}
    two = {key: synthetic.weight(key, shape, seed=1) for key, shape in layout.items()}
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    two[key][1, 2] = torch.nan
    with pytest.raises(NumericsError, match=r"down_blocks\.1\.attentions\.0.*to_q holds NaN"):
        lorakit.extract(
            lorakit.open_source(one),
            lorakit.open_source(two),
            rule=lorakit.RankRule(rank=4),
            choice=lorakit.Choice(svd="fast", convs=False),
            compute=TOGETHER,
        )


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("device", [*DEVICES, "cpu:0"])
def test_stacked_matrices_arrive_in_order(count: int, device: str) -> None:
    matrices = [torch.full((3, 4), float(place)) for place in range(count)]
    found = stacked(matrices, torch.device(device))
    assert found.device.type == torch.device(device).type
    assert torch.equal(found.cpu(), torch.stack(matrices))


def test_products_are_whole_while_layers_are_decomposed(models: tuple[Path, Path]) -> None:
    seen = set()

    def look(what: str, done: int, total: int) -> None:
        seen.add(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")
    try:
        lora = lorakit.load_lora(synthetic.lora_tensors("sd1", rank=4, factor=32))
        lorakit.resize(lora, rule=lorakit.RankRule(rank=2), compute=ALONE, progress=look)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "highest" in seen


def test_a_model_is_read_in_the_order_of_its_file(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    read = spectra._Solver.__call__

    def watched(self: spectra._Solver, pieces: Sequence[Piece]) -> list[spectra.Found]:
        seen.extend(piece.place for piece in pieces)
        return read(self, pieces)

    monkeypatch.setattr(spectra._Solver, "__call__", watched)
    lora, report = extracted(models, Compute(threads=1))
    assert seen == sorted(seen)
    assert len(set(seen)) == len(report.rows)
    assert [row.module for row in report.rows] == sorted(row.module for row in report.rows)
    assert list(lora.adapters) == sorted(lora.adapters)
