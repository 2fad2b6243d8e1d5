"""What holds for all matrices: bounds, invariances, sums."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.linalg.factored import Factors, balanced, dense, distance, join, norm, scaled, svd
from lorakit.linalg.ranks import RankRule, choose_rank, kept, ranks_for_size
from lorakit.linalg.rounding import rounded_sum
from tests import reference

SIZES = st.integers(1, 12)
SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@st.composite
def factors(draw: st.DrawFn, m: int | None = None, n: int | None = None) -> Factors:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    m, n = m or draw(SIZES), n or draw(SIZES)
    r = draw(SIZES)
    up, down = torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)
    if draw(st.booleans()):
        up[:, draw(st.integers(0, r - 1))] = 0
    return Factors(up=up * 10.0 ** draw(st.integers(-8, 8)), down=down)


@given(factors())
@settings(deadline=None, max_examples=60)
def test_the_svd_gives_the_product_back(f: Factors) -> None:
    found = svd(f)
    again = (found.u.double() * found.s) @ found.v.double().T
    assert reference.relative_error(again, f.up.double() @ f.down.double()) < 1e-6
    assert bool((found.s.diff() <= 0).all())
    assert distance(f, balanced(found, len(found.s))) < 1e-6


@given(factors(6, 5), factors(6, 5), st.integers(-40, 40).map(lambda tenths: tenths / 10))
@settings(deadline=None, max_examples=40)
def test_a_join_is_the_sum_in_any_order(a: Factors, b: Factors, strength: float) -> None:
    one, other = join([a, scaled(b, strength)]), join([scaled(b, strength), a])
    whole = a.up.double() @ a.down.double() + strength * (b.up.double() @ b.down.double())
    scale = norm(a) + abs(strength) * norm(b)
    assert float((dense(one).double() - whole).norm()) <= 1e-5 * scale
    assert norm(join([one, scaled(other, -1.0)])) <= 1e-6 * scale


@given(SPECTRA, st.floats(0.01, 1.0))
@settings(deadline=None, max_examples=60)
def test_an_energy_rule_keeps_enough_and_no_more(s: torch.Tensor, share: float) -> None:
    rank = choose_rank(s, RankRule(energy=share), conv=False)
    assert kept(s, rank)[0] >= share * (1 - 1e-9)
    assert rank == 1 or kept(s, rank - 1)[0] < share


@given(st.dictionaries(st.text(max_size=3), SPECTRA, max_size=5), st.integers(0, 400))
@settings(deadline=None, max_examples=60)
def test_a_budget_is_never_exceeded(spectra: dict[str, torch.Tensor], budget: int) -> None:
    price = {name: 5 + len(name) for name in spectra}
    keys = dict.fromkeys(spectra, 7)
    ranks = ranks_for_size(spectra, price, budget, overhead=keys, caps=dict.fromkeys(spectra))
    spent = sum(rank * price[name] + 7 * (rank > 0) for name, rank in ranks.items())
    assert spent <= budget
    assert all(0 <= rank <= len(spectra[name]) for name, rank in ranks.items())


@given(factors(7, 9), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
@settings(deadline=None, max_examples=60)
def test_a_sum_is_rounded_once(f: Factors, kind: torch.dtype) -> None:
    base = torch.linspace(-3, 3, 63).reshape(7, 9).to(kind)
    exact = base.double() + f.up.double() @ f.down.double()
    expected = reference.round_once(exact.numpy(), kind)
    assert torch.equal(rounded_sum(base, f.up, f.down, kind), expected)
