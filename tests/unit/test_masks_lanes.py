"""Random masks: 16-bit lanes of a stream that a name and a position alone decide."""

from hashlib import blake2b

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.linalg.masks import lanes
from lorakit.linalg.tiles import Place
from lorakit.methods.dropping import LEVELS, dropped, dropped_by_rank, mask_name

KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.float64])


def test_lanes_are_the_parts_of_a_philox_stream_the_lowest_first() -> None:
    """Written down once more with shifts: the order of a machine's bytes must not count."""
    name = mask_name("dare-linear", 7, "owner#2", "unet.layer")
    assert name == "lorakit.mask.v1\ndare-linear\n7\nowner#2\nunet.layer"
    key = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(300)
    plain = [int(word) >> shift & 65535 for word in words for shift in (0, 16, 32, 48)]
    assert lanes(name, 0, 1200).tolist() == plain
    assert lanes(name, 1001, 17).tolist() == plain[1001:1018]


def test_lanes_far_along_a_stream() -> None:
    """A matrix may have more elements than 32 bits can count."""
    start = 2**34 + 5
    found = lanes("far", start, 40)
    assert found.tolist() == [int(lanes("far", start + i, 1)[0]) for i in range(40)]
    assert lanes("far", start, 0).shape == (0,)
    assert not np.array_equal(found, lanes("far", 5, 40)), "the counter does not wrap"


def whole(tile: Tensor, top: int = 0) -> Place:
    return slice(top, top + tile.shape[0]), slice(0, tile.shape[1])


@KINDS
def test_equal_magnitudes_of_a_row_rank_in_order(kind: torch.dtype) -> None:
    row = torch.tensor([[0.0, -2.0, 1.0, 2.0, -0.0, 1.0, 0.0]], dtype=kind)
    _, factor = dropped_by_rank(row, whole(row), name="x", density=0.5, epsilon=0.3)
    chances = torch.linspace(0.2, 0.8, 7, dtype=torch.float64)
    rank = [0, 5, 3, 6, 1, 4, 2]
    expected = [LEVELS / round(LEVELS * float(chances[r])) for r in rank]
    torch.testing.assert_close(factor[0], torch.tensor(expected, dtype=kind), rtol=1e-7, atol=0)


@pytest.mark.parametrize("columns", [1, 2, 37, 1300])
def test_ranks_are_the_same_in_fp32_and_fp64(columns: int) -> None:
    """In fp32 rank and column are sorted as one number; in fp64 by a stable sort."""
    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(40, columns, generator=generator) * 50).round() / 50
    single, double = (
        dropped_by_rank(x.to(kind), whole(x), name="x", density=0.5, epsilon=0.2)
        for kind in (torch.float32, torch.float64)
    )
    assert torch.equal(single[0], double[0])
    torch.testing.assert_close(single[1].double(), double[1], rtol=1e-7, atol=0)


def test_a_mask_of_ranks_does_not_depend_on_the_tile() -> None:
    x = torch.randn(30, 17, generator=torch.Generator().manual_seed(1))
    all_at_once = dropped_by_rank(x, whole(x), name="x", density=0.5, epsilon=0.2)
    part = dropped_by_rank(x[11:20], whole(x[11:20], 11), name="x", density=0.5, epsilon=0.2)
    assert torch.equal(part[0], all_at_once[0][11:20])
    assert torch.equal(part[1], all_at_once[1][11:20])


@pytest.mark.parametrize(("density", "epsilon"), [(0.85, 0.15), (0.15, 0.15)])
def test_chances_at_their_bounds(density: float, epsilon: float) -> None:
    """A chance of one keeps always, one of nothing is a 65536th."""
    x = torch.arange(1.0, 12.0).repeat(200, 1)
    mask, factor = dropped_by_rank(x, whole(x), name="x", density=density, epsilon=epsilon)
    assert float(factor.min()) >= 1.0 and float(factor.max()) <= LEVELS
    always = factor == 1.0
    assert bool(mask[always].all()) and bool(always[:, -1].all()) == (density == 0.85)


def test_without_a_spread_of_chances_both_draws_are_one() -> None:
    """A million lanes: some of them lie on the very bound."""
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(2))
    for density in (0.001, 0.5):
        mask, factor = dropped_by_rank(x, whole(x), name="x", density=density, epsilon=0.0)
        fair, inverse = dropped(x, whole(x), name="x", density=density)
        assert torch.equal(mask, fair) and bool((factor == inverse).all())
