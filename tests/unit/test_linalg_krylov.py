"""Leading directions of large matrices: near the optimum, for every kind of spectrum."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.linalg.krylov import Leading, leading

KINDS = ("slow", "root", "harmonic", "steep", "noise", "flat", "low rank", "faint noise")


def found(a: Tensor, rank: int, seed_name: str = "seed") -> Leading:
    (one,) = several([a], rank, seed_name)
    return one


def several(matrices: list[Tensor], rank: int, seed_name: str = "seed") -> list[Leading]:
    energy = torch.tensor([float(a.double().norm() ** 2) for a in matrices], dtype=torch.float64)
    batch = matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)
    return leading(batch, rank, energy=energy, tolerance=1e-3, seed_name=seed_name)


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
    it = found(a, rank)
    rest = a.double() - (it.u.double() * it.s) @ it.v.double().T
    best = math.sqrt(float(squares[rank:].sum()))
    assert best * (1 - 1e-4) <= float(rest.norm()) <= best * 1.01
    for side in (it.u, it.v):
        torch.testing.assert_close(side.T @ side, torch.eye(rank), rtol=0, atol=2e-5)


def test_a_matrix_of_low_rank_is_found_whole_and_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, 8, generator=g) @ torch.randn(8, 300, generator=g)
    it = found(a, 32)
    assert it.half_passes <= 4
    rest = a.double() - (it.u.double() * it.s) @ it.v.double().T
    assert float(rest.norm() / a.norm()) < 1e-6


def test_transposed_and_strided_views_are_as_good_and_the_seed_is_all_the_chance() -> None:
    a = matrix(160, 400, "root")
    first, again, other = found(a, 8, "one"), found(a, 8, "one"), found(a, 8, "two")
    view = found(a.T.contiguous().T, 8, "one")
    assert torch.equal(first.u, again.u)
    assert torch.equal(first.v, again.v)
    torch.testing.assert_close(view.s, first.s, rtol=1e-5, atol=0)
    assert not torch.equal(other.u, first.u)


def test_matrices_taken_together_are_found_as_well_as_each_alone() -> None:
    # One of them has no more than 8 directions, one has to be looked at for long.
    kinds = ("root", "low rank", "slow", "noise")
    matrices = [matrix(160, 400, kind) for kind in kinds]
    eight = torch.linalg.svd(matrices[1], full_matrices=False)
    matrices[1] = (eight.U[:, :8] * eight.S[:8]) @ eight.Vh[:8]
    for together, a in zip(several(matrices, 16), matrices, strict=True):
        alone = found(a, 16)
        assert together.half_passes >= alone.half_passes
        captured, least = float((together.s**2).sum()), float((alone.s**2).sum())
        assert captured >= least * (1 - 1e-6)
        off = a.double() - (together.u.double() * together.s) @ together.v.double().T
        rest = float(a.double().norm() ** 2) - captured
        assert float(off.norm() ** 2) == pytest.approx(rest, rel=1e-3, abs=1e-6)
