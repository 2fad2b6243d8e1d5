"""Norms of large matrices: as exact as they say, for every kind of spectrum, and repeatable."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.compute import Compute, ordered_map
from lorakit.errors import NumericsError
from lorakit.linalg.norms import TOLERANCE, Spectral, frobenius, spectral
from tests.reference import negative_control

LARGE = [(200, 200), (160, 900), (900, 160)]
SMALL = [(1, 1), (1, 70), (70, 1), (40, 90), (128, 129)]


def found(matrix: Tensor, seed_name: str = "seed") -> Spectral:
    return spectral(matrix, frobenius=frobenius(matrix), seed_name=seed_name)


def turned(values: Tensor, n: int) -> Tensor:
    """Return a matrix [m, n] with these singular values in random directions."""
    g = torch.Generator().manual_seed(len(values) + n)
    u = torch.linalg.qr(torch.randn(len(values), len(values), generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, len(values), generator=g))[0]
    return (u * values) @ v.T


PLACE = torch.arange(1, 201).float()
SPECTRA = {
    "root": PLACE**-0.5,
    "steep": torch.exp(-PLACE / 15),
    "flat": torch.ones(200),
    "one of rank": torch.where(PLACE <= 1, 1.0, 0.0),
    "three of rank": torch.where(PLACE <= 3, 1.0, 0.0),
    "two alike": torch.where(PLACE <= 2, 2.0, 1.0),
    "two close": torch.where(PLACE == 1, 1.001, torch.where(PLACE == 2, 1.0, 0.5)),
    "crowded": torch.linspace(1.0, 0.9, 200),
    "one stands out": torch.where(PLACE <= 1, 10.0, 1.0),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_spectral_norm_of_every_spectrum(kind: str) -> None:
    for factor in (1.0, 1e-20, 1e20):
        matrix = turned(SPECTRA[kind], 300) * factor
        exact = float(torch.linalg.svdvals(matrix.double())[0])

        def check(answer: Tensor, exact: float = exact) -> None:
            torch.testing.assert_close(answer.item(), exact, rtol=TOLERANCE, atol=0)

        negative_control(check, torch.tensor(found(matrix).value, dtype=torch.float64))


@pytest.mark.parametrize("shape", [*LARGE, *SMALL])
def test_noise_is_the_hardest_and_every_start_finds_it(shape: tuple[int, int]) -> None:
    """One vector to start from would be nearly orthogonal to the largest now and then."""
    g = torch.Generator().manual_seed(1)
    for seed in range(20):
        matrix = torch.randn(*shape, generator=g)
        exact = torch.linalg.svdvals(matrix.double())
        one = found(matrix, str(seed))
        assert exact[0] * (1 - TOLERANCE) <= one.value <= exact[0] * (1 + 1e-6)
        assert one.value >= exact[0] * (1 - one.off - 1e-6), "the estimate covers the error"
        assert one.steps == (0 if min(shape) <= 128 else one.steps) < 40
        assert frobenius(matrix) == pytest.approx(float(exact.norm()), rel=1e-6)


def test_a_tighter_tolerance_is_kept() -> None:
    matrix = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    for tolerance in (1e-2, 1e-4, 1e-6):
        one = spectral(matrix, frobenius=frobenius(matrix), seed_name="a", tolerance=tolerance)
        assert abs(one.value / exact - 1) <= tolerance
        assert one.off <= tolerance


def test_zero_is_zero_and_what_is_not_finite_is_refused() -> None:
    assert frobenius(torch.zeros(3, 4)) == 0.0
    assert found(torch.zeros(300, 400)) == Spectral(value=0.0, off=0.0, steps=0)
    for odd in (math.nan, math.inf):
        matrix = torch.ones(3, 4)
        matrix[1, 2] = odd
        with pytest.raises(NumericsError, match="NaN or infinity"):
            frobenius(matrix)


def test_views_threads_and_repetition_change_nothing() -> None:
    matrix = torch.randn(180, 400, generator=torch.Generator().manual_seed(0))
    first = found(matrix)
    assert found(matrix) == first
    strided = torch.stack([matrix, matrix], dim=2)[:, :, 0]
    for view in (matrix.T, matrix.T.contiguous().T, strided):
        assert found(view).value == pytest.approx(first.value, rel=1e-6)
    several = list(ordered_map(found, [matrix] * 6, compute=Compute(threads=3)))
    assert several == [first] * 6
    assert found(matrix, "another").value == pytest.approx(first.value, rel=TOLERANCE)
