"""Products of factors: each function against the dense float64 twin."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import (
    Factors,
    Svd,
    balanced,
    decomposed,
    dense,
    distance,
    gram,
    inner,
    join,
    norm,
    numerical_rank,
    scaled,
    svd,
)
from lorakit.linalg.sides import Side, reduced
from tests import reference

TIGHT = 3e-7
"""The results are rounded once to fp32: 6e-8 an entry, with room."""


def factors(m: int, n: int, r: int, *, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(up=torch.randn(m, r, generator=g), down=torch.randn(r, n, generator=g))


def truth(f: Factors) -> Tensor:
    return f.up.double() @ f.down.double()


def product(found: Svd) -> Tensor:
    return (found.u.double() * found.s) @ found.v.double().T


SHAPES = [(40, 30, 4), (30, 40, 4), (5, 60, 8), (60, 5, 8), (6, 7, 20), (1, 9, 1), (64, 64, 64)]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_the_svd_is_the_dense_one(m: int, n: int, r: int) -> None:
    f = factors(m, n, r)
    found = svd(f)
    k = min(m, n, r)
    assert (found.u.shape, found.s.shape, found.v.shape) == ((m, k), (k,), (n, k))

    def check(answer: Tensor) -> None:
        assert reference.relative_error(answer, truth(f)) < TIGHT

    reference.negative_control(check, product(found))
    expected = torch.linalg.svdvals(truth(f))[:k]
    torch.testing.assert_close(found.s, expected, rtol=0, atol=1e-11 * float(expected[0]))
    for side in (found.u.double(), found.v.double()):
        torch.testing.assert_close(side.T @ side, torch.eye(k).double(), rtol=0, atol=1e-6)


def test_the_largest_entry_of_each_left_direction_is_positive() -> None:
    u = svd(factors(40, 30, 6)).u
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("gauge", [1e6, 1e-6, -3.0])
def test_the_gauge_of_the_factors_does_not_matter(gauge: float) -> None:
    f = factors(40, 30, 6)
    turned = Factors(up=f.up.double() * gauge, down=f.down.double() / gauge)
    torch.testing.assert_close(svd(turned).s, svd(f).s, rtol=1e-12, atol=0)
    uneven = torch.logspace(-6, 6, 6).double()
    turned = Factors(up=f.up.double() * uneven, down=f.down.double() / uneven[:, None])
    torch.testing.assert_close(svd(turned).s, svd(f).s, rtol=1e-11, atol=0)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_nearly_dependent_columns_do_no_harm(condition: float) -> None:
    g = torch.Generator().manual_seed(1)
    mix = torch.linalg.qr(torch.randn(6, 6, generator=g).double())[0]
    mix = mix * torch.logspace(0, -math.log10(condition), 6).double()
    f = factors(40, 30, 6)
    turned = Factors(up=f.up.double() @ mix, down=torch.linalg.solve(mix, f.down.double()))
    # The turned factors themselves are only as near as the condition times 1e-16.
    assert reference.relative_error(product(svd(turned)), truth(f)) < 1e-14 * condition + 1e-14


def graded(m: int, n: int, r: int, *, least: float, dependent: str = "") -> Factors:
    """Return fp64 factors whose product has singular values that fall from 1 to `least`.

    Those of the `dependent` side are nearly one direction.
    """
    f = factors(m, n, r)
    u, v = (torch.linalg.qr(side).Q for side in (f.up.double(), f.down.double().T))
    mixing = torch.linalg.qr(factors(r, r, r, seed=1).up.double()).Q
    s = torch.logspace(0, math.log10(least), r, dtype=torch.float64)
    left, right = {"up": (s, one(s)), "down": (one(s), s)}.get(dependent, (s.sqrt(), s.sqrt()))
    return Factors(up=(u * left) @ mixing, down=mixing.T @ (v * right).T)


def one(s: Tensor) -> Tensor:
    return torch.ones_like(s)


@pytest.mark.parametrize("dependent", ["", "up", "down"])
@pytest.mark.parametrize("least", [0.5, 1e-2, 1e-4, 0.99e-5, 1e-6, 1e-9])
def test_singular_values_of_every_size_are_right(least: float, dependent: str) -> None:
    f = graded(90, 70, 12, least=least, dependent=dependent)
    found = decomposed(f)
    expected = torch.logspace(0, math.log10(least), 12, dtype=torch.float64)
    # What is below 1e-5 of the largest is far below what fp32 holds.
    large = expected > 1e-5
    torch.testing.assert_close(found.s[large], expected[large], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.s, expected, rtol=0, atol=1e-9)
    some = found.first(12)
    for side in (some.u, some.v):
        torch.testing.assert_close(side.T @ side, torch.eye(12).double(), rtol=0, atol=1e-5)
    assert reference.relative_error(product(some), truth(f)) < 1e-9


def test_the_right_side_is_reduced_only_where_products_do_not_suffice(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls: list[tuple[int, ...]] = []

    def watched(side: Tensor, products: Tensor | None = None) -> Side:
        calls.append(tuple(side.shape))
        return reduced(side, products)

    monkeypatch.setattr("lorakit.linalg.factored.reduced", watched)
    decomposed(graded(90, 70, 12, least=1e-4))
    assert not calls
    decomposed(graded(90, 70, 12, least=1e-6))
    decomposed(factors(90, 10, 12))
    assert calls == [(70, 12), (10, 12)]


def test_zero_columns_and_zero_factors_give_zero_directions() -> None:
    f = factors(20, 10, 4)
    f.up[:, 1] = 0
    assert numerical_rank(svd(f).s, (20, 10)) == 3
    nothing = svd(Factors(up=torch.zeros(20, 4), down=f.down))
    assert numerical_rank(nothing.s, (20, 10)) == 0
    torch.testing.assert_close(nothing.u.T @ nothing.u, torch.eye(4))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_a_join_of_equals_has_the_rank_of_one(kind: torch.dtype) -> None:
    f = factors(320, 128, 8)
    f = Factors(up=f.up.to(kind).float(), down=f.down.to(kind).float())
    twice = join([scaled(f, 0.7), scaled(f, 0.4)])
    assert numerical_rank(svd(twice).s, twice.shape) == 8


@pytest.mark.parametrize("strength", [1.0, 0.3, 1e-5, 1e5])
def test_a_minus_a_is_nothing_beside_the_norm_of_a(strength: float) -> None:
    a = scaled(factors(320, 128, 8), strength)
    # Another rounding of the same product.
    b = Factors(up=a.up * 0.7, down=a.down * (1 / 0.7))
    gone = join([a, scaled(b, -1.0)])
    assert norm(gone) < 2e-7 * norm(a)
    assert numerical_rank(svd(gone).s, gone.shape, reference=norm(a)) == 0


def test_a_small_direction_is_no_noise() -> None:
    assert numerical_rank(torch.tensor([1.0, 1e-6]), (9, 9)) == 2
    assert numerical_rank(torch.tensor([1.0, 1e-7]), (9, 9)) == 1
    assert numerical_rank(torch.tensor([1.0, 1e-6]), (9, 9), reference=100.0) == 1
    assert numerical_rank(torch.zeros(0), (9, 9)) == 0


def test_norms_and_inner_products_are_the_dense_ones() -> None:
    parts = [factors(30, 20, r, seed=r) for r in (3, 5, 1)]
    flat = torch.stack([truth(part).flatten() for part in parts])
    torch.testing.assert_close(gram(parts), flat @ flat.T, rtol=1e-12, atol=1e-10)
    assert inner(parts[0], parts[1]) == pytest.approx(float(flat[0] @ flat[1]), rel=1e-10)
    assert norm(parts[1]) == pytest.approx(float(flat[1].norm()), rel=1e-12)
    whole = join([parts[0], scaled(parts[2], -0.5)])
    assert (
        reference.relative_error(dense(whole), flat[0].view(30, 20) - flat[2].view(30, 20) / 2)
        < 1e-6
    )


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 1e-7, 1e-10])
def test_a_distance_is_right_however_small(size: float) -> None:
    a, b = factors(60, 50, 6), factors(60, 50, 6, seed=1)
    a = Factors(up=a.up.double(), down=a.down.double())
    off = scaled(Factors(up=b.up.double(), down=b.down.double()), size * norm(a) / norm(b))
    assert distance(a, join([a, off])) == pytest.approx(size, rel=1e-3)


def test_the_distance_of_zeros_is_zero() -> None:
    zero = Factors(up=torch.zeros(5, 2), down=torch.zeros(2, 4))
    assert distance(zero, zero) == 0.0
    assert distance(zero, factors(5, 4, 2)) == math.inf
    assert distance(factors(5, 4, 2), zero) == 1.0


def test_balanced_factors_share_the_size_and_are_the_best_of_their_rank() -> None:
    f = factors(40, 30, 10)
    half = balanced(svd(f), 4)
    torch.testing.assert_close(half.up.norm(dim=0), half.down.norm(dim=1), rtol=1e-5, atol=0)

    def check(answer: Tensor) -> None:
        assert reference.relative_error(answer, reference.best_rank(truth(f), 4)) < 1e-6

    reference.negative_control(check, dense(half))


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_tiny_and_huge_factors_neither_vanish_nor_overflow(size: float) -> None:
    f = factors(40, 30, 6)
    found = svd(Factors(up=f.up * size, down=f.down * size))
    torch.testing.assert_close(found.s / size**2, svd(f).s, rtol=1e-6, atol=0)
