"""What every method makes of two LoRAs that are parallel, opposite or orthogonal, or of none."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors, scaled
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.methods.table import combine

FP64, FP32 = 1e-9, 1e-6
SPACED = [(name, space) for name in MENU for space in MENU[name].spaces or (None,)]
in_each_space = pytest.mark.parametrize(("name", "space"), SPACED)
VOTING = [(name, space) for name, space in SPACED if MENU[name].votes]


def basis(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, 8, generator=generator, dtype=torch.float64))[0]


LEFT, RIGHT = basis(40, 0), basis(30, 1)
SIGMA = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
A = Factors(up=LEFT[:, :4] * SIGMA, down=RIGHT[:, :4].T)
B = Factors(up=LEFT[:, 4:] * SIGMA, down=RIGHT[:, 4:].T)
"""Orthogonal to A on both sides."""


def merged(name: str, space: str | None, *terms: tuple[Factors, float]) -> Tensor:
    given = [
        Delta(change=change, strength=strength, owner=str(number))
        for number, (change, strength) in enumerate(terms)
    ]
    method = Method(name=name, space=space).filled(into_lora=True)
    return dense(combine(given, method, module="layer")).double()


def shares(found: Tensor) -> tuple[float, float, float]:
    """Return how often A and B are in a matrix, and what of it is neither, relative to A."""
    a, b = dense(A), dense(B)
    of_a, of_b = (float((found * x).sum() / x.square().sum()) for x in (a, b))
    return of_a, of_b, float((found - of_a * a - of_b * b).norm() / a.norm())


PARALLEL = {
    "linear": 3.0, "slerp": 3.0, "karcher": 3.0, "model-stock": 3.0, "ctm": 3.0,
    "tsv": 1.5,
    "sce": (1 * 1 + 4 * 2) / 5,
}  # fmt: skip
"""Of A and 2·A: their sum, their mean, their mean by energy."""
ORTHOGONAL = {
    "linear": 1.0, "tsv": 1.0,
    "slerp": math.sqrt(2), "karcher": math.sqrt(2),
    "model-stock": 0.0,
}  # fmt: skip
"""Both as they are, both lifted to the norm 2 · ‖A‖, nothing."""


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_loras(name: str) -> None:
    for space in MENU[name].spaces or (None,):
        found = merged(name, space, (A, 1.0), (scaled(A, 2.0), 1.0))
        assert shares(found) == pytest.approx((PARALLEL[name], 0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_orthogonal_loras(name: str) -> None:
    found = merged(name, None, (A, 1.0), (B, 1.0))
    share = ORTHOGONAL[name]
    assert shares(found) == pytest.approx((share, share, 0.0), abs=FP64)


def test_ctm_has_no_room_for_two_orthogonal_loras_at_the_rank_of_one() -> None:
    """Of four directions the first two of each: the others are left out."""
    found = merged("ctm", None, (A, 1.0), (B, 1.0))
    kept = [scaled(Factors(up=x.up[:, :2], down=x.down[:2]), 1.0) for x in (A, B)]
    assert float((found - dense(kept[0]) - dense(kept[1])).norm()) < FP64


def test_iso_c_gives_all_directions_of_orthogonal_loras_the_mean() -> None:
    for name in ("iso-c", "iso-cts"):
        values = torch.linalg.svdvals(merged(name, None, (A, 1.0), (B, 1.0)))
        assert values[:8].tolist() == pytest.approx([2.5] * 8) and float(values[8]) < FP64


@in_each_space
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.3, 0.3), (-1.0, -1.0)])
def test_opposite_loras_leave_nothing(
    name: str, space: str | None, strengths: tuple[float, float]
) -> None:
    """A, and a file of -A in other factors: their last bits elect no sign, and turn no arc."""
    other = Factors(up=A.up * 7.1, down=A.down / -7.1)
    found = merged(name, space, (A, strengths[0]), (other, strengths[1]))
    assert float(found.norm()) < (FP32 if space == "full" else FP64)


@pytest.mark.parametrize(("name", "space"), VOTING)
def test_what_is_opposite_in_a_part_of_two_loras_elects_nothing_there(
    name: str, space: str
) -> None:
    """A, and B - A in one file, as two LoRAs whose factors were put side by side."""
    both = Factors(up=torch.cat([A.up, -B.up], dim=1), down=torch.cat([-A.down, -B.down]))
    method = Method(name=name, space=space, density=1.0).filled(into_lora=True)
    given = [
        Delta(change=change, strength=1.0, owner=str(number))
        for number, change in enumerate((A, both))
    ]
    of_a, of_b, _ = shares(dense(combine(given, method, module="layer")).double())
    if space == "core":
        assert abs(of_a) < FP64
    assert abs(of_a) < 0.5 and of_b > 0.4


@in_each_space
def test_of_two_opposite_loras_the_larger_one_wins(name: str, space: str | None) -> None:
    found = merged(name, space, (A, 1.0), (scaled(A, -2.0), 1.0))
    if name == "model-stock":
        assert not found.any()
    else:
        assert shares(found)[0] < -0.3


@in_each_space
def test_nothing_is_nothing_and_beside_a_lora_it_does_not_count(
    name: str, space: str | None
) -> None:
    zero = Factors(up=torch.zeros(40, 2).double(), down=RIGHT[:, :2].T)
    assert not merged(name, space, (zero, 1.0), (zero, -0.5)).any()
    found = merged(name, space, (zero, 1.0), (A, -0.5))
    assert torch.allclose(found, -0.5 * dense(A), rtol=1e-6, atol=1e-6)
