"""Rank rules: what each keeps, to the last direction."""

import math

import pytest
import torch

from lorakit.errors import SpecError
from lorakit.linalg.ranks import RankRule, choose_rank, kept, ranks_for_size

S = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        # kohya keeps one more for each of these three.
        (RankRule(sv_ratio=4.0), 2),
        (RankRule(sv_sum=0.75), 2),
        (RankRule(energy=0.93), 2),
        (RankRule(sv_ratio=4.001), 3),
        (RankRule(sv_ratio=1.0), 1),
        (RankRule(error=0.26), 2),
        (RankRule(error=0.24), 3),
        (RankRule(energy=1.0), 8),
        (RankRule(error=0.0), 8),
        (RankRule(rank=3), 3),
        (RankRule(rank=99), 8),
        (RankRule(), 8),
        (RankRule(rank=1, energy=0.93), 1),
        (RankRule(rank=5, energy=0.93), 2),
    ],
)
def test_a_rule_keeps_the_fewest_directions_that_satisfy_it(rule: RankRule, rank: int) -> None:
    assert choose_rank(S, rule, conv=False) == rank
    assert choose_rank(S * 1e-20, rule, conv=False) == rank


def test_a_goal_reached_exactly_needs_no_further_direction() -> None:
    even = torch.ones(10)
    assert choose_rank(even, RankRule(energy=0.3), conv=False) == 3
    assert choose_rank(even, RankRule(sv_sum=0.7), conv=False) == 7


@pytest.mark.parametrize("rule", [RankRule(rank=4), RankRule(energy=0.9), RankRule(sv_ratio=2.0)])
def test_zero_has_rank_zero_and_anything_else_at_least_one(rule: RankRule) -> None:
    assert choose_rank(torch.zeros(5), rule, conv=False) == 0
    assert choose_rank(torch.zeros(0), rule, conv=False) == 0
    assert choose_rank(torch.tensor([1e-30, 0.0]), rule, conv=False) == 1


def test_what_was_cut_off_before_counts_in_the_total() -> None:
    whole = float((S**2).sum())
    assert choose_rank(S[:3], RankRule(energy=0.93), conv=False, energy_total=whole) == 2
    assert choose_rank(S[:3], RankRule(energy=0.9999), conv=False, energy_total=whole) == 3


def test_kernels_have_their_own_cap() -> None:
    rule = RankRule(rank=4, conv_rank=2)
    assert (rule.cap(False), rule.cap(True)) == (4, 2)
    assert RankRule(rank=4).cap(True) == 4
    assert choose_rank(S, rule, conv=True) == 2
    assert RankRule().exact
    assert not rule.exact


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"conv_rank": -1},
        {"energy": 1.5},
        {"energy": math.nan},
        {"error": -0.1},
        {"sv_ratio": 0.5},
        {"sv_sum": 2.0},
        {"size": 0},
        {"energy": 0.9, "error": 0.1},
        {"size": 10, "sv_sum": 0.5},
    ],
)
def test_a_rule_out_of_range_or_a_second_rule_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        RankRule(**options)  # type: ignore[arg-type]


def test_what_is_kept_is_told_exactly() -> None:
    energy, error = kept(S, 2)
    squares = S.double() ** 2
    assert energy == pytest.approx(float(squares[:2].sum() / squares.sum()), rel=1e-12)
    assert error == pytest.approx(math.sqrt(float(squares[2:].sum() / squares.sum())), rel=1e-12)
    assert kept(S, 8) == (1.0, 0.0)
    assert kept(torch.zeros(3), 0) == (1.0, 0.0)
    assert kept(torch.tensor([1.0, 1e-9]), 1)[1] == pytest.approx(1e-9, rel=1e-6)


def test_the_budget_goes_to_the_most_energy_a_byte() -> None:
    spectra = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0]), "c": torch.ones(2)}
    price, free = dict.fromkeys(spectra, 10), dict.fromkeys(spectra, 0)
    none = dict.fromkeys(spectra)
    assert ranks_for_size(spectra, price, 30, overhead=free, caps=none) == {"a": 1, "b": 2, "c": 0}
    # a is four times as dear: 16 / 40 is less than 9 / 10 and 4 / 10 comes level with it.
    dear = price | {"a": 40}
    assert ranks_for_size(spectra, dear, 20, overhead=free, caps=none) == {"a": 0, "b": 2, "c": 0}
    capped = ranks_for_size(spectra, price, 30, overhead=free, caps=none | {"b": 1})
    assert capped["b"] == 1
    assert sum(capped.values()) == 3


def test_the_first_direction_pays_for_the_keys() -> None:
    spectra = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([3.5])}
    price, keys = {"a": 10, "b": 10}, {"a": 5, "b": 5}
    none = dict.fromkeys(spectra)
    assert ranks_for_size(spectra, price, 14, overhead=keys, caps=none) == {"a": 0, "b": 0}
    assert ranks_for_size(spectra, price, 15, overhead=keys, caps=none) == {"a": 1, "b": 0}
    assert ranks_for_size(spectra, price, 25, overhead=keys, caps=none) == {"a": 2, "b": 0}
    assert ranks_for_size(spectra, price, 40, overhead=keys, caps=none) == {"a": 2, "b": 1}
