"""The truncated SVD of a dense matrix, and rank rules on one."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg import krylov
from lorakit.linalg.dense import TruncatedSvd, svd_for_rule, truncated_svd
from lorakit.linalg.ranks import RankRule, choose_rank
from tests import reference

METHODS = ["auto", "exact", "fast"]


def decaying(m: int, n: int, *, power: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g))[0]
    return (u * torch.arange(1, k + 1) ** -power) @ v.T


def product(found: TruncatedSvd) -> Tensor:
    return (found.u.double() * found.s) @ found.v.double().T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n"), [(220, 210), (150, 700), (700, 150), (8, 8), (1, 30), (30, 1)])
def test_the_error_is_near_the_best_and_the_residual_is_the_error(
    method: str, m: int, n: int
) -> None:
    a = decaying(m, n)
    rank = min(16, m, n)
    found = truncated_svd(a, rank=rank, method=method, seed_name="x")
    best = reference.relative_error(reference.best_rank(a, rank), a)
    error = reference.relative_error(product(found), a)
    assert best * (1 - 1e-4) - 1e-9 <= error <= best * 1.01 + 2e-6
    assert found.residual == pytest.approx(error, rel=1e-3, abs=2e-6)
    assert found.energy_total == pytest.approx(float(a.double().norm() ** 2), rel=1e-5)
    assert found.u.dtype == found.v.dtype == torch.float32
    assert bool((found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all())


def test_the_exact_answer_is_the_best_one() -> None:
    a = decaying(120, 300)

    def check(answer: Tensor) -> None:
        assert reference.relative_error(answer, reference.best_rank(a, 12)) < 1e-5

    found = truncated_svd(a, rank=12, method="exact")
    assert found.exact
    reference.negative_control(check, product(found))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r", [1, 5])
def test_a_low_rank_is_found_whole(method: str, r: int) -> None:
    g = torch.Generator().manual_seed(r)
    a = torch.randn(300, r, generator=g) @ torch.randn(r, 200, generator=g)
    found = truncated_svd(a, rank=24, method=method, seed_name="x")
    assert found.residual < 2e-6
    assert reference.relative_error(product(found), a) < 2e-6
    # Directions of rounding noise may come along, but none of any size.
    assert float(found.s[r:].sum()) < 1e-5 * float(found.s[0])


@pytest.mark.parametrize("method", METHODS)
def test_zero_has_no_direction(method: str) -> None:
    found = truncated_svd(torch.zeros(90, 120), rank=4, method=method, seed_name="x")
    assert (found.u.shape, found.s.shape, found.v.shape) == ((90, 0), (0,), (120, 0))
    assert found.energy_total == found.residual == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_entries_neither_vanish_nor_overflow(method: str, size: float) -> None:
    a = decaying(150, 200)
    plain = truncated_svd(a, rank=6, method=method, seed_name="x")
    found = truncated_svd(a * size, rank=6, method=method, seed_name="x")
    torch.testing.assert_close(found.s / size, plain.s, rtol=2e-3, atol=0)
    assert found.residual == pytest.approx(plain.residual, rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    a = decaying(80, 90)
    a[3, 4] = value
    with pytest.raises(NumericsError, match="NaN or infinity"):
        truncated_svd(a, rank=4, seed_name="x")


@pytest.mark.parametrize(
    "rule",
    [
        RankRule(energy=0.3),
        RankRule(energy=0.6),
        RankRule(error=0.7),
        RankRule(sv_ratio=5.0),
        RankRule(sv_ratio=9.0),
        RankRule(sv_sum=0.2),
        RankRule(rank=7, energy=0.6),
        RankRule(rank=12),
    ],
)
def test_a_rule_finds_the_rank_that_the_whole_spectrum_gives(rule: RankRule) -> None:
    a = decaying(260, 330)
    spectrum = torch.linalg.svdvals(a.double())
    expected = choose_rank(spectrum, rule, conv=False)
    found = svd_for_rule(a, rule, conv=False, seed_name="x")
    chosen = choose_rank(found.s, rule, conv=False, energy_total=found.energy_total)
    # Within one percent of the best error: a direction more, where the goal is that near.
    assert expected <= chosen <= expected + 1 + expected // 50


def test_a_kernel_follows_its_own_cap() -> None:
    found = svd_for_rule(decaying(200, 220), RankRule(rank=9, conv_rank=3), conv=True)
    assert len(found.s) == 3


def test_what_does_not_converge_is_decomposed_exactly_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = decaying(280, 300, power=0.1)
    monkeypatch.setattr(krylov, "_MOST_HALF_PASSES", 3)
    forced = truncated_svd(a, rank=8, method="fast", seed_name="x")
    assert "stopped after 3 products; one more is worth" in forced.note
    assert not forced.exact
    found = truncated_svd(a, rank=8, seed_name="x")
    assert found.exact
    assert found.note.endswith("so decomposed exactly")
    best = reference.relative_error(reference.best_rank(a, 8), a)
    assert found.residual == pytest.approx(best, rel=1e-5)
    assert forced.residual > best * 1.001
