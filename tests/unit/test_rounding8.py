"""Rounding to fp8 against a search among all of its numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg.rounding8 import (
    rounded8_add,
    rounded8_sum,
    rounded_fp8,
    surviving,
    widened_fp8,
)

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]


def codes(kind: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the finite numbers of a dtype from 0 up, by the format's definition, and their codes.

    Not by torch: sign, exponent and mantissa are put together here.
    """
    bits = {torch.float8_e4m3fn: (3, 7), torch.float8_e5m2: (2, 15)}[kind]
    mantissa, bias = bits
    top = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}[kind]
    code = np.arange(top + 1)
    exponent, part = code >> mantissa, code & (2**mantissa - 1)
    normal = (1 + part / 2**mantissa) * 2.0 ** (exponent - bias)
    subnormal = part / 2**mantissa * 2.0 ** (1 - bias)
    return np.where(exponent == 0, subnormal, normal), code


def nearest(values: Tensor, kind: torch.dtype) -> Tensor:
    """Search the nearest of all numbers in float64; of two as near, the one with an even code."""
    numbers, code = codes(kind)
    # Beyond 1e9 float64 would call all distances the same.
    flat = np.minimum(np.abs(values.double().numpy().reshape(-1)), 1e9)
    distance = np.abs(flat[:, None] - numbers[None])
    least = distance.min(axis=1, keepdims=True)
    # Even codes first: argmin takes the first of equals.
    order = np.argsort(code % 2, kind="stable")
    best = code[order][np.argmax((distance == least)[:, order], axis=1)]
    sign = np.signbit(values.double().numpy().reshape(-1)).astype(np.uint8) << 7
    found = torch.from_numpy((best.astype(np.uint8) | sign).astype(np.uint8))
    return found.view(kind).reshape(values.shape)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def hard_values(kind: torch.dtype) -> Tensor:
    """Return all numbers, all ties, and what lies a hair beside each of them, of both signs."""
    numbers, _ = codes(kind)
    step = numbers[-1] - numbers[-2]
    ties = np.append((numbers[1:] + numbers[:-1]) / 2, numbers[-1] + step / 2)
    places = np.concatenate([numbers, ties, [numbers[-1] + step, 1e6, 1e300, 1e-45, 1e-300]])
    up, down = np.nextafter(places, np.inf), np.nextafter(places, -np.inf)
    hair = places * (1 + 2.0**-27), places * (1 - 2.0**-27)
    whole = np.concatenate([places, up, np.abs(down), *hair])
    return torch.from_numpy(np.concatenate([whole, -whole]))


@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_all_ties_and_their_neighbours_round_as_they_should(kind: torch.dtype) -> None:
    values = hard_values(kind)
    assert torch.equal(bits(rounded_fp8(values, kind)), bits(nearest(values, kind)))
    narrow = values.float()
    narrow = narrow[narrow.isfinite()]
    assert torch.equal(bits(rounded_fp8(narrow, kind)), bits(nearest(narrow, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_random_values_of_all_sizes_round_as_they_should(kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    powers = torch.randint(-22, 20, (30000,), generator=g)
    values = torch.randn(30000, generator=g, dtype=torch.float64) * 2.0**powers
    assert torch.equal(bits(rounded_fp8(values, kind)), bits(nearest(values, kind)))
    table = values.reshape(100, 300).T
    assert torch.equal(bits(rounded_fp8(table, kind)), bits(nearest(table.contiguous(), kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_way_would_fail_beside_a_tie(kind: torch.dtype) -> None:
    values = hard_values(kind)
    values = values[values.abs() < torch.finfo(kind).max]
    plain = values.float().to(kind)
    assert not torch.equal(bits(plain), bits(nearest(values, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_number_is_the_limit_and_nan_stays(kind: torch.dtype) -> None:
    top = torch.finfo(kind).max
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, -1e30])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = rounded_fp8(odd.to(dtype), kind).float()
        expected = torch.tensor([top, -top, float("nan"), top, -top])
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_widening_is_exact_for_all_codes(kind: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    found, expected = widened_fp8(every), every.float()
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int32)[number], expected.view(torch.int32)[number])
    table = torch.arange(256, dtype=torch.uint8).reshape(16, 16).T
    assert torch.equal(
        widened_fp8(table.view(kind)).nan_to_num(7.0),
        table.contiguous().view(kind).float().nan_to_num(7.0),
    )
    numbers, code = codes(kind)
    assert torch.equal(
        widened_fp8(torch.from_numpy(code.astype(np.uint8)).view(kind)).double(),
        torch.from_numpy(numbers),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base_kind", [None, torch.float16, torch.float32, torch.float64])
def test_sums_are_the_float64_sum_rounded_once(
    kind: torch.dtype, base_kind: torch.dtype | None
) -> None:
    g = torch.Generator().manual_seed(1)
    base = torch.randn(61, 67, generator=g).to(base_kind or kind)
    up, down = torch.randn(61, 4, generator=g) * 0.1, torch.randn(4, 67, generator=g)
    before = base.clone()
    exact = base.double() + up.double() @ down.double()
    assert torch.equal(bits(rounded8_sum(base, up, down, kind)), bits(nearest(exact, kind)))
    delta = up.double() @ down.double()
    assert torch.equal(bits(rounded8_add(base, delta, kind)), bits(nearest(exact, kind)))
    turned = rounded8_sum(base.T.contiguous().T, up, down, kind)
    assert torch.equal(bits(turned), bits(nearest(exact, kind)))
    assert torch.equal(before.double(), base.double()), "the base is left as it is"


def test_many_blocks_are_as_one() -> None:
    g = torch.Generator().manual_seed(2)
    base = torch.randn(700, 1024, generator=g).to(torch.float8_e4m3fn)
    up, down = torch.randn(700, 2, generator=g), torch.randn(2, 1024, generator=g)
    whole = rounded8_sum(base, up, down, torch.float8_e4m3fn)
    exact = base.double() + up.double() @ down.double()
    assert torch.equal(bits(whole), bits(rounded_fp8(exact, torch.float8_e4m3fn)))
    assert rounded8_sum(base[:0], up[:0], down, torch.float8_e4m3fn).shape == (0, 1024)


@pytest.mark.parametrize(
    ("kind", "fits", "too_large"),
    [(KINDS[0], 464.0, 464.0 + 2.0**-40), (KINDS[1], 61440.0 - 2.0**-30, 61440.0)],
)
def test_a_sum_that_does_not_fit_is_an_error(
    kind: torch.dtype, fits: float, too_large: float
) -> None:
    for sign in (1.0, -1.0):
        base = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        found = rounded8_add(base, torch.tensor([[sign * fits, 0.0]], dtype=torch.float64), kind)
        assert found.float().tolist() == [[sign * torch.finfo(kind).max, 1.0]]
        delta = torch.tensor([[sign * too_large, 0.0]], dtype=torch.float64)
        with pytest.raises(NumericsError, match="overflows F8_E"):
            rounded8_add(base, delta, kind)
        delta = torch.tensor([[sign * too_large, float("nan")]], dtype=torch.float64)
        with pytest.raises(NumericsError, match="overflows F8_E"):
            rounded8_add(base, delta, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_finite_stays_so(kind: torch.dtype) -> None:
    base = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]])
    found = rounded8_add(base, torch.zeros(1, 4), kind).float()
    assert found[0, 3] == 1.0
    assert not found[0, :3].isfinite().any()
    if kind == torch.float8_e5m2:
        assert found[0, :2].tolist() == [float("inf"), float("-inf")]


def test_how_much_of_a_change_survives() -> None:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(50, 60, generator=g).to(torch.float8_e4m3fn).double()
    change = torch.randn(50, 60, generator=g).double()
    assert surviving(change, base + change, base) == 1.0
    assert surviving(change, base, base) == 0.0
    assert surviving(change, base + 0.75 * change, base) == pytest.approx(0.75)
    assert surviving(torch.zeros(50, 60), base, base) == 1.0
    lost = rounded8_add(base, change * 1e-4, torch.float8_e4m3fn)
    kept = rounded8_add(base, change, torch.float8_e4m3fn)
    assert surviving(change * 1e-4, widened_fp8(lost), base) < 0.1
    assert surviving(change, widened_fp8(kept), base) > 0.9
