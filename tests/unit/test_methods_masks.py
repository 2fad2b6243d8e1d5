"""The parts of the elementwise methods: random lanes, exact thresholds, chances."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.linalg.masks import lanes
from lorakit.linalg.tiles import Place, places
from lorakit.methods import selection
from lorakit.methods.dropping import LEVELS, dropped, dropped_by_rank, mask_name
from lorakit.methods.selection import thresholds
from lorakit.methods.trimming import EVERYTHING, NOTHING, largest, largest_of_rows

GOLDEN = [34508, 63087, 8381, 63750, 25579, 41518, 5387, 41987]
FAR = [28146, 10028, 14609, 47540, 23183]


def test_the_stream_is_what_it_was() -> None:
    """Golden numbers: a change of these changes every merge that was ever seeded."""
    assert lanes("golden", 0, 8).tolist() == GOLDEN
    assert lanes("golden", 100003, 5).tolist() == FAR


@given(start=st.integers(0, 5000), count=st.integers(0, 300))
def test_any_part_of_a_stream_is_the_part_of_the_whole(start: int, count: int) -> None:
    whole = lanes("some name", 0, 5400)
    assert np.array_equal(lanes("some name", start, count), whole[start : start + count])


def test_lanes_are_uniform_and_streams_independent() -> None:
    one, other = (lanes(name, 0, 2**18).astype(float) for name in ("one", "other"))
    assert abs(one.mean() - 32767.5) < 5 * 18918 / 512
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 512
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 5 / 512


def test_each_part_of_a_mask_s_name_counts() -> None:
    names = {
        mask_name("ties", 0, "a", "m"),
        mask_name("dare", 0, "a", "m"),
        mask_name("ties", 1, "a", "m"),
        mask_name("ties", 0, "b", "m"),
        mask_name("ties", 0, "a", "n"),
        mask_name("ties", 0, "a\nm", ""),
    }
    assert len(names) == 6


def tiled(x: Tensor, sides: tuple[int, int]) -> Iterator[tuple[Place, Tensor]]:
    for place in places((x.shape[0], x.shape[1]), sides):
        yield place, x[place].abs()


def kept(x: Tensor, count: int, sides: tuple[int, int], sample: Tensor | None = None) -> Tensor:
    shape = (x.shape[0], x.shape[1])
    found = x.abs() if sample is None else sample
    (cut,) = largest(lambda: tiled(x, sides), (count,), shape=shape, sample=lambda: found)
    mask = torch.zeros(shape, dtype=torch.bool)
    for place, tile in tiled(x, sides):
        mask[place] = cut.kept(tile, place) > 0
    return mask


def wanted(x: Tensor, count: int) -> Tensor:
    """The plain way: a stable sort of all magnitudes."""
    order = x.abs().flatten().sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(x.shape)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    share=st.floats(0.0, 1.0),
    levels=st.sampled_from([1, 2, 3, 50]),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
    kind=st.sampled_from([torch.float32, torch.float64]),
    small=st.booleans(),
)
def test_the_largest_are_exactly_as_many_and_the_first_of_equals(
    rows: int, columns: int, share: float, levels: int, sides: tuple[int, int], seed: int,
    kind: torch.dtype, small: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).to(kind)
    count = int(share * x.numel())
    before, selection._SMALL = selection._SMALL, 1 if small else selection._SMALL
    try:
        found, expected = kept(x, count, sides), wanted(x, count)
    finally:
        selection._SMALL = before
    # A zero that is kept or dropped is zero.
    assert torch.equal(found, expected & (x != 0))


@pytest.mark.parametrize("sample", ["true", "zeros", "huge", "one"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.9])
def test_a_sample_that_misleads_costs_time_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, sample: str, share: float
) -> None:
    monkeypatch.setattr(selection, "_SMALL", 500)
    x = torch.randn(120, 90, generator=torch.Generator().manual_seed(1))
    samples = {
        "true": x.abs(),
        "zeros": torch.zeros(40, 40),
        "huge": torch.full((40, 40), 1e30),
        "one": x[:1, :1].abs(),
    }
    count = int(share * x.numel())
    assert torch.equal(kept(x, count, (16, 32), samples[sample]), wanted(x, count))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-40])
def test_a_constant_matrix_keeps_its_first_elements(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(selection, "_SMALL", 10)
    x = torch.full((20, 30), value)
    found = kept(x, 77, (6, 7))
    assert torch.equal(found, wanted(x, 77) & (x != 0))


def test_nothing_and_everything() -> None:
    x = torch.randn(4, 5)
    place = (slice(0, 4), slice(0, 5))
    assert not NOTHING.kept(x, place).any()
    assert torch.equal(EVERYTHING.kept(x, place), x)
    (last,) = thresholds(lambda: tiled(x, (2, 2)), (20,), whole=20, sample=x.abs)
    assert last.value == float(x.abs().min())


def test_fp16_values_have_many_equals() -> None:
    """topk, argsort and a stable sort keep three sets of equal magnitudes; we keep the first."""
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(2)).half().float()
    x = (x * 16).round() / 16
    count = int(0.2 * x.numel())
    assert torch.equal(kept(x, count, (64, 128)), wanted(x, count))


@given(count=st.integers(0, 6), first=st.integers(0, 3), seed=st.integers(0, 50))
def test_the_largest_of_each_row(count: int, first: int, seed: int) -> None:
    x = torch.randint(-2, 3, (4, 6), generator=torch.Generator().manual_seed(seed)).float()
    found = largest_of_rows(x.abs(), first, count)
    for row, mask in zip(x, found, strict=True):
        order = sorted(range(6), key=lambda i: (-abs(float(row[i])), i))[first : first + count]
        assert sorted(order) == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("density", [1e-9, 0.13, 0.5, 1 - 1e-9, 1.0])
def test_dropping_keeps_its_share_and_makes_up_for_it_exactly(density: float) -> None:
    tile = torch.ones(200, 300)
    mask, factor = dropped(tile, (slice(0, 200), slice(0, 300)), name="x", density=density)
    level = LEVELS / factor
    assert level == round(level) and 1 <= level <= LEVELS
    share, chance = float(mask.double().mean()), level / LEVELS
    assert abs(share - chance) <= 5 * math.sqrt(chance * (1 - chance) / tile.numel())
    assert abs(chance - density) <= 1 / LEVELS


def test_rows_of_one_mask_do_not_depend_on_the_tile() -> None:
    tile = torch.randn(30, 17)
    whole = dropped(tile, (slice(0, 30), slice(0, 17)), name="x", density=0.4)[0]
    part = dropped(tile[11:20], (slice(11, 20), slice(0, 17)), name="x", density=0.4)[0]
    assert torch.equal(part, whole[11:20])


def test_large_elements_of_a_row_are_kept_more_often() -> None:
    row = torch.arange(1.0, 12.0).repeat(4000, 1)
    place = (slice(0, 4000), slice(0, 11))
    mask, factor = dropped_by_rank(row, place, name="x", density=0.5, epsilon=0.2)
    chances = torch.linspace(0.3, 0.7, 11, dtype=torch.float64)
    assert float((1 / factor[0] - chances).abs().max()) < 1 / LEVELS
    assert float((mask.double().mean(dim=0) - chances).abs().max()) < 5 * 0.5 / math.sqrt(4000)


def test_a_row_of_one_element_has_the_mean_chance() -> None:
    """mergekit 0.1.5 divides zero by zero there."""
    tile = torch.randn(50, 1)
    mask, factor = dropped_by_rank(
        tile, (slice(0, 50), slice(0, 1)), name="x", density=0.5, epsilon=0.2
    )
    assert bool((factor == 2.0).all()) and 0 < int(mask.sum()) < 50
