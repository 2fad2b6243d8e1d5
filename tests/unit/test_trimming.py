"""Exact thresholds without a sort: how often a matrix is made, what is held, ties across tiles."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorakit.linalg import tiles
from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Place, places
from lorakit.methods import cuts, selection
from lorakit.methods.cuts import model_cuts
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method
from lorakit.methods.sampling import sample_of
from lorakit.methods.selection import Threshold, thresholds
from lorakit.methods.stacking import Tiles, grid_of
from lorakit.methods.trimming import largest, numbers, trimming

KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.float64])
SIDES = (64, 100)


def normal(rows: int, columns: int, seed: int = 0, kind: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(kind)


class Made:
    """Makes the magnitudes of a matrix tile by tile, and counts how often."""

    def __init__(self, x: Tensor, sides: tuple[int, int] = SIDES) -> None:
        self.x, self.sides, self.times = x, sides, 0

    def __call__(self) -> Iterator[tuple[Place, Tensor]]:
        self.times += 1
        for place in places((self.x.shape[0], self.x.shape[1]), self.sides):
            yield place, self.x[place].abs().contiguous()


def plainly(x: Tensor, rank: int) -> tuple[float, int, int]:
    ranked = x.abs().flatten().sort(descending=True).values
    value = ranked[rank - 1]
    return float(value), rank - int((ranked > value).sum()), int((ranked == value).sum())


def found(made: Tiles, ranks: tuple[int, ...], x: Tensor) -> list[tuple[float, int, int]]:
    given: list[Threshold] = thresholds(made, ranks, whole=x.numel(), sample=lambda: sample_of(x))
    return [(at.value, at.quota, at.equal) for at in given]


@KINDS
def test_one_pass_finds_every_threshold(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SMALL", 1000)
    x = normal(700, 500, kind=kind)
    made = Made(x)
    ranks = (1, 3500, 70000, 175000, 349999, 350000)
    assert found(made, ranks, x) == [plainly(x, rank) for rank in ranks]
    assert made.times == 1


@KINDS
@pytest.mark.parametrize("levels", [1, 3, 40])
def test_numbers_that_are_mostly_equal_are_counted_by_their_digits(
    kind: torch.dtype, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a few are held, however many equal the threshold."""
    monkeypatch.setattr(selection, "_SMALL", 10)
    monkeypatch.setattr(selection, "_HELD", 50)
    x = (normal(90, 130, kind=kind) * levels).round() / levels
    made = Made(x)
    for rank in (1, 2000, 5000, x.numel()):
        assert found(made, (rank,), x) == [plainly(x, rank)]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-20, 3.4e38])
@KINDS
def test_the_least_and_the_largest_numbers(
    kind: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_SMALL", 10)
    monkeypatch.setattr(selection, "_HELD", 10)
    x = torch.full((20, 30), value, dtype=kind)
    assert found(Made(x), (77,), x) == [(float(x[0, 0]), 77, 600)]


@KINDS
@pytest.mark.parametrize("held", [2**24, 100])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_of_equal_ones_the_first_by_rows_are_kept_across_tiles(
    kind: torch.dtype, held: int, whole_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles come by columns of tiles, elements by rows: the order of tiles is another one."""
    monkeypatch.setattr(selection, "_HELD", held)
    x = (normal(150, 230, kind=kind) * 4).round() / 4
    sides = (7, 230) if whole_rows else (64, 100)
    for count in (1, 5000, 17250, 30000):
        (cut,) = largest(Made(x, sides), (count,), shape=(150, 230), sample=lambda: sample_of(x))
        order = x.abs().flatten().sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros(x.numel(), dtype=kind)
        expected[order] = x.flatten()[order]
        answer = torch.empty_like(x)
        for place in places((150, 230), sides):
            answer[place] = cut.kept(x[place].contiguous(), place)
        assert torch.equal(answer, expected.reshape(x.shape))


def factors(rows: int = 1300, columns: int = 700, rank: int = 8, seed: int = 0) -> Factors:
    return Factors(up=normal(rows, rank, seed), down=normal(rank, columns, seed + 1))


@pytest.mark.parametrize(("gamma", "kept"), [(0.0, 0.3), (0.02, 0.3), (0.9, 0.4), (0.0001, 0.995)])
def test_breadcrumbs_keep_their_share_and_leave_out_the_largest(gamma: float, kept: float) -> None:
    change = factors()
    delta = Delta(change=change, strength=1.0)
    method = Method(name="breadcrumbs", density=kept, gamma=gamma).filled(into_lora=False)
    grid = grid_of([delta])
    thin = trimming(change, method, grid, None)
    whole, thinned = torch.empty(grid.shape), torch.empty(grid.shape)
    for place in grid.places():
        whole[place] = change.up[place[0]] @ change.down[:, place[1]]
        tile = whole[place].clone()
        thin(tile, place)
        thinned[place] = tile
    count, outliers = numbers(method, whole.numel())
    assert count == int(kept * whole.numel())
    assert outliers == min(int(gamma * whole.numel()), whole.numel() - count)
    order = whole.abs().flatten().sort(descending=True, stable=True).indices
    assert torch.equal(thinned != 0, _mask(order[outliers : outliers + count], whole))
    assert torch.equal(thinned[thinned != 0], whole[thinned != 0])


def _mask(order: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(like.shape)


def test_few_elements_never_vanish() -> None:
    """int(gamma · 64) is 0: a peer once cut an empty end off, and with it everything."""
    method = Method(name="breadcrumbs", density=0.9, gamma=0.01)
    assert numbers(method, 64) == (57, 0)
    assert numbers(Method(name="ties", density=0.2), 3) == (1, 0)
    assert numbers(Method(name="ties", density=0.2, flavor="peft"), 3) == (0, 0)


@pytest.mark.parametrize("shape", [(5, 3), (1300, 700), (1, 4000), (4000, 1), (33, 65)])
def test_a_sample_is_spread_over_all_rows_and_columns(shape: tuple[int, int]) -> None:
    x = torch.arange(float(math.prod(shape))).reshape(shape)
    drawn = sample_of(x)
    rows, columns = drawn // shape[1], drawn % shape[1]
    assert min(shape[0], 512) <= len(rows.unique())
    assert min(shape[1], 512) <= len(columns.unique())
    up, down = torch.ones(shape[0], 1), torch.ones(1, shape[1])
    both = Factors(up=torch.cat([x[:, :1], up], dim=1), down=torch.cat([down, x[:1]]))
    torch.testing.assert_close(
        sample_of(both), (x[:, :1] + x[:1]).abs()[rows.long(), columns.long()]
    )


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("small", [10, 2**17])
def test_one_threshold_for_all_layers_of_each_lora(
    density: float, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_SMALL", small)
    monkeypatch.setattr(cuts, "_SHARE", 16)
    layers = [
        [
            Delta(change=factors(rows, columns, seed=10 * n + rows), strength=0.5, owner=owner)
            for n, owner in enumerate("ab")
        ]
        for rows, columns in ((30, 20), (64, 300), (17, 1))
    ]
    layers[1].pop()
    modules = [lambda deltas=deltas: deltas for deltas in layers]  # type: ignore[misc]
    answer = model_cuts(modules, density)
    assert model_cuts(modules[::-1], density) == answer
    for owner in "ab":
        mine = [d.change for deltas in layers for d in deltas if d.owner == owner]
        whole = torch.cat([(c.up @ c.down).flatten() for c in mine])  # type: ignore[union-attr]
        rank = max(1, int(density * len(whole)))
        # A product of other sides may have another last bit.
        assert answer[owner] == pytest.approx(plainly(whole, rank)[0], rel=1e-6)


def test_thresholds_do_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(60, 44, kind=torch.float64)
    method = Method(name="ties", density=0.3).filled(into_lora=False)
    answers = []
    for block, columns in ((2**18, 1024), (700, 19), (1, 1)):
        monkeypatch.setattr(tiles, "BLOCK", block)
        monkeypatch.setattr(tiles, "COLUMNS", columns)
        grid = grid_of([Delta(change=x, strength=1.0)])
        thin, answer = trimming(x, method, grid, None), x.clone()
        for place in grid.places():
            thin(answer[place], place)
        answers.append(answer)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert int((answers[0] != 0).sum()) == int(0.3 * x.numel())
