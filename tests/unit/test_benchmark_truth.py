"""The checks inside the benchmarks must be able to fail."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import measure, truth
from tests import reference

STRENGTH = 0.8


@pytest.fixture(scope="module")
def baked(sd15: Path, sd15_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors, lora = load_file(sd15), truth.File(sd15_lora)
    for layer in truth.layers("sd1", factor=32):
        weight = tensors[layer.key]
        total = reference.apply(weight, [(lora.delta(layer), STRENGTH)], weight.dtype)
        tensors[layer.key] = total.reshape(weight.shape)
    path = tmp_path_factory.mktemp("baked") / "baked.safetensors"
    save_file(tensors, path)
    return path


def test_a_right_bake_passes_and_a_wrong_strength_fails(sd15, sd15_lora, baked):
    layers = truth.layers("sd1", factor=32)
    assert truth.inexact(sd15, baked, {sd15_lora: STRENGTH}, layers) == []
    for wrong in (0.0, 0.9 * STRENGTH):
        found = truth.inexact(sd15, baked, {sd15_lora: wrong}, layers)
        assert len(found) == len(layers) == 264


def test_one_wrong_bit_is_found(sd15, sd15_lora, baked, tmp_path):
    layers = truth.layers("sd1", factor=32)
    touched = frozenset(layer.key for layer in layers)
    assert truth.changed_elsewhere(sd15, baked, touched) == []
    assert set(truth.changed_elsewhere(sd15, baked, frozenset())) == touched
    tensors = load_file(baked)
    tensors["model.diffusion_model.out.2.bias"].view(torch.int16)[0] ^= 1
    tensors[layers[0].key].view(torch.int16).view(-1)[0] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged)
    found = truth.inexact(sd15, damaged, {sd15_lora: STRENGTH}, layers)
    assert found == [f"{layers[0].name}: 1 of {tensors[layers[0].key].numel()} elements"]
    assert truth.changed_elsewhere(sd15, damaged, touched) == ["model.diffusion_model.out.2.bias"]


def test_the_error_against_the_best_rank_sees_a_worse_approximation():
    layer = truth.layers("sd1", factor=32)[0]
    dense = torch.randn(24, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = reference.best_rank(dense, 4)
    expected = reference.relative_error(best, dense)
    assert truth.best_error(dense, 4) == pytest.approx(expected, rel=1e-9)
    found = truth.excess({layer: best}, {layer: dense}, 4)
    assert (found.mean, found.worst) == pytest.approx((expected, 1.0), rel=1e-9)
    assert "1.0000 times the best rank 4" in str(found)
    assert truth.excess({layer: 0.9 * best}, {layer: dense}, 4).worst > 1.001


def test_the_limits_leave_nothing_behind(sd15, tmp_path):
    assert measure.copy_and_sync(sd15, tmp_path) > 0
    assert measure.read_all(sd15, sd15) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("turned", [False, True])
def test_the_fewest_products_are_those_after_which_the_best_subspace_is_good_enough(turned):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=g).double()).Q for n in (40, 60))
    spectra = {
        # The first product finds the rows of a matrix of that rank, the second its columns.
        "of the rank": torch.where(torch.arange(40) < 4, 1.0, 1e-4),
        "steep": 2.0 ** -torch.arange(40),
        "slow": torch.linspace(1.0, 0.1, 40),
    }
    found = {}
    for name, s in spectra.items():
        dense = (left * s.double()) @ right.T
        found[name] = truth.products_within(dense.T if turned else dense, 4, 1.01)
    assert 2 <= found["of the rank"] <= found["steep"] <= 3 < found["slow"]
    assert truth.products_within(dense, 4, 1.001) > truth.products_within(dense, 4, 1.1)
