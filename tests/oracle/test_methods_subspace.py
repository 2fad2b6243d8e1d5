"""The subspace methods where directions are shared, rounding, missing, or said to be too many."""

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.ctm import ctm
from lorakit.methods.delta import Delta
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from tests import reference, twins
from tests.oracle.test_methods_twins import FP64, SHAPES, close, deltas, found, signed

SUBSPACE = [name for name in MENU if MENU[name].family == "subspace"]
FP32 = 1e-4
"""Singular vectors of fp32 factors: their rounding over the gaps between singular values."""


def factors_of(delta: Delta) -> Factors:
    assert isinstance(delta.change, Factors)
    return delta.change


def regauged(delta: Delta, seed: int) -> Delta:
    """Write the same ΔW as (up · G, G⁻¹ · down)."""
    change = factors_of(delta)
    generator = torch.Generator().manual_seed(seed)
    gauge = torch.randn(change.rank, change.rank, generator=generator, dtype=torch.float64)
    gauge = 10 * (gauge + 3 * torch.eye(change.rank, dtype=torch.float64))
    other = Factors(up=change.up @ gauge, down=torch.linalg.solve(gauge, change.down))
    return Delta(change=other, strength=delta.strength, owner=delta.owner)


def padded(delta: Delta, more: int) -> Delta:
    """Write the same ΔW in factors of a larger rank."""
    change = factors_of(delta)
    up, down = change.up.new_zeros(change.shape[0], more), change.down.new_ones(more, 44)
    other = Factors(up=torch.cat([change.up, up], dim=1), down=torch.cat([change.down, down]))
    return Delta(change=other, strength=delta.strength, owner=delta.owner)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 4, 7])
def test_ctm_is_the_dense_iteration(shape: tuple[int, int], rank: int) -> None:
    given = deltas(shape)
    close(dense(ctm(given, Method(name="ctm"), rank)), twins.ctm(signed(given), rank), 1e-8)


@pytest.mark.parametrize("name", SUBSPACE)
def test_neither_a_basis_of_the_factors_nor_their_number_matters(name: str) -> None:
    given = deltas()
    expected = found(Method(name=name), given)
    turned = [regauged(delta, seed) for seed, delta in enumerate(given)]
    close(found(Method(name=name), turned), expected, 1e-8)
    close(found(Method(name=name), [padded(delta, 5) for delta in given]), expected, 1e-8)


@pytest.mark.parametrize("name", SUBSPACE)
def test_factors_in_fp32_give_the_same(name: str) -> None:
    expected = found(Method(name=name), deltas())
    answer = found(Method(name=name), deltas(kind=torch.float32))
    assert reference.relative_error(answer, expected) < FP32


@pytest.mark.parametrize("rank", [2, 4, 20])
def test_tsv_shares_its_rank_out_among_the_loras_that_differ(rank: int) -> None:
    one, other, _ = deltas(strengths=(1.0, 1.0, 1.0))
    again = Delta(change=one.change, strength=1.0, owner=f"{one.owner}#2")
    close(found(Method(name="tsv"), [one, again], rank=rank), best(one, rank), 1e-8)
    both = found(Method(name="tsv"), [one, again, other], rank=4)
    assert int(torch.linalg.matrix_rank(both, rtol=1e-9)) == 4, "two of each"


def best(delta: Delta, rank: int) -> Tensor:
    return reference.best_rank(dense(delta.change), rank)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_iso_cts_takes_no_rounding_for_a_direction(kind: torch.dtype) -> None:
    """A LoRA that is the leading direction of another has nothing of its own."""
    whole = dense(deltas(ranks=(8,))[0].change)
    u, s, v = twins.svd(whole, 8)
    common = Factors(up=(u[:, :1] * s[:1]).to(kind), down=v[:, :1].T.to(kind))
    given = [
        Delta(change=Factors(up=(u * s).to(kind), down=v.T.to(kind)), strength=1.0, owner="a"),
        Delta(change=common, strength=1.0, owner="b"),
    ]
    answer = found(Method(name="iso-cts", density=0.5), given)
    outside = answer - u @ (u.T @ answer)
    assert float(outside.norm() / answer.norm()) < 1e-6
    assert int(torch.linalg.matrix_rank(answer, rtol=1e-5)) == 6, "4 common ones and 2 of a's"


def test_iso_cts_keeps_directions_for_loras_of_small_rank() -> None:
    """Of 10 directions 8 are common and 1 each of two LoRAs; rounded down there would be none."""
    given = deltas(strengths=(1.0, 1.0), ranks=(4, 6))
    answer = found(Method(name="iso-cts"), given)
    close(answer, twins.iso_cts(signed(given), 0.8), 1e-8)
    alike = found(Method(name="iso-c"), given)
    assert reference.relative_error(answer, alike) > 0.1


def test_iso_c_lifts_no_rounding_of_what_cancels() -> None:
    one, other, _ = deltas(strengths=(1.0, 1.0, 1.0), kind=torch.float32)
    change = factors_of(one)
    again = Factors(up=change.up * 10, down=change.down / 10)
    given = [one, Delta(change=again, strength=-1.0, owner="again"), other]
    expected = twins.iso_c(signed(deltas(strengths=(1.0, 1.0, 1.0))[1:2]))
    close(found(Method(name="iso-c"), given), expected, 1e-5)


@pytest.mark.parametrize("calibrate", ["none", "pico"])
@pytest.mark.parametrize("name", MENU)
def test_a_layer_of_zeros_counts_as_one_that_is_not_there(name: str, calibrate: str) -> None:
    """Trainers save layers that they never trained: up is zero, down random."""
    one, other, _ = deltas(strengths=(0.8, 0.5, 1.0), seed=3)
    dead = Factors(up=torch.zeros(60, 2).double(), down=torch.ones(2, 44).double())
    method = Method(name=name, calibrate=calibrate)
    for alive in ([one], [one, other]):
        with_dead = [*alive, Delta(change=dead, strength=1.0, owner="zero")]
        assert torch.equal(found(method, with_dead), found(method, alive))
    alone = [Delta(change=dead, strength=s, owner=str(s)) for s in (1.0, 0.5)]
    assert not found(method, alone, rank=4).any()


@pytest.mark.parametrize("name", SUBSPACE)
@pytest.mark.parametrize("shape", [(4, 2), (1, 9), (9, 1)])
def test_layers_that_are_smaller_than_the_ranks(name: str, shape: tuple[int, int]) -> None:
    given = deltas(shape, ranks=(3, 5, 2))
    answer = found(Method(name=name), given)
    assert answer.shape == shape and bool(answer.isfinite().all()) and bool(answer.any())
    if name == "ctm":
        close(found(Method(name=name), given, rank=10), torch.stack(signed(given)).sum(0), FP64)
