"""Leading directions of large matrices: near the optimum, for every kind of spectrum."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.linalg.krylov import leading

KINDS = ("slow", "root", "harmonic", "steep", "noise", "flat", "low rank", "faint noise")


def matrix(m: int, n: int, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(5)
    u = torch.linalg.qr(torch.randn(m, m, generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, m, generator=g))[0]
    i = torch.arange(1, m + 1).float()
    noise = torch.randn(m, n, generator=g) / math.sqrt(m * n)
    eight = torch.where(i <= 8, 1.0, 0.0)
    spectra = {
        "slow": i**-0.25,
        "root": i**-0.5,
        "harmonic": 1 / i,
        "steep": torch.exp(-i / 15),
        "noise": 0 * i,
        "flat": torch.ones(m),
        "low rank": eight,
        "faint noise": eight,
    }
    tail = {"noise": 1.0, "low rank": 1.0, "faint noise": 0.01}.get(kind, 0.0)
    return (u * spectra[kind]) @ v.T + tail * noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "rank"), [(200, 200, 32), (160, 900, 16), (256, 300, 4)])
def test_the_error_is_within_one_percent_of_the_best(m: int, n: int, rank: int, kind: str) -> None:
    a = matrix(m, n, kind)
    squares = torch.linalg.svdvals(a.double()) ** 2
    found = leading(a, rank, energy=float(squares.sum()), tolerance=3e-3, seed_name="seed")
    rest = a.double() - (found.u.double() * found.s) @ found.v.double().T
    best = math.sqrt(float(squares[rank:].sum()))
    assert best * (1 - 1e-4) <= float(rest.norm()) <= best * 1.01
    for side in (found.u, found.v):
        torch.testing.assert_close(side.T @ side, torch.eye(rank), rtol=0, atol=2e-5)


def test_a_matrix_of_low_rank_is_found_whole_and_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, 8, generator=g) @ torch.randn(8, 300, generator=g)
    found = leading(a, 32, energy=float(a.double().norm() ** 2), tolerance=3e-3, seed_name="seed")
    assert found.half_passes <= 4
    rest = a.double() - (found.u.double() * found.s) @ found.v.double().T
    assert float(rest.norm() / a.norm()) < 1e-6


def test_transposed_and_strided_views_are_as_good_and_the_seed_is_all_the_chance() -> None:
    a = matrix(160, 400, "root")
    energy = float(a.double().norm() ** 2)
    first = leading(a, 8, energy=energy, tolerance=3e-3, seed_name="one")
    again = leading(a, 8, energy=energy, tolerance=3e-3, seed_name="one")
    view = leading(a.T.contiguous().T, 8, energy=energy, tolerance=3e-3, seed_name="one")
    other = leading(a, 8, energy=energy, tolerance=3e-3, seed_name="two")
    assert torch.equal(first.u, again.u)
    assert torch.equal(first.v, again.v)
    torch.testing.assert_close(view.s, first.s, rtol=1e-5, atol=0)
    assert not torch.equal(other.u, first.u)
