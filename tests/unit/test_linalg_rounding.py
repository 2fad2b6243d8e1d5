"""Sums for a checkpoint: bit for bit the float64 sum, rounded once."""

import pytest
import torch
from torch import Tensor

from lorakit.linalg.rounding import rounded_sum, to_odd
from tests import reference

KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits(values: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return values.contiguous().view(whole)


def parts(kind: torch.dtype, r: int, *, size: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(r)
    base = (torch.randn(301, 403, generator=g) * 0.03).to(kind)
    return base, torch.randn(301, r, generator=g) * size, torch.randn(r, 403, generator=g) * 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 64])
@pytest.mark.parametrize("size", [1e-5, 0.02, 10.0])
def test_the_bits_are_those_of_the_float64_sum(kind: torch.dtype, r: int, size: float) -> None:
    base, up, down = parts(kind, r, size=size)
    expected = base.double() + up.double() @ down.double()
    found = rounded_sum(base, up, down, kind)
    if kind == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-16)
    else:
        assert torch.equal(bits(found), bits(reference.round_once(expected.numpy(), kind)))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_plain_way_would_fail_here(kind: torch.dtype) -> None:
    base, up, down = parts(kind, 64)
    expected = reference.round_once((base.double() + up.double() @ down.double()).numpy(), kind)
    plain = torch.addmm(base.float(), up, down).to(kind)
    assert not torch.equal(bits(plain), bits(expected))


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("off", [-40, -30, -26])
def test_a_hair_beside_a_tie_decides(kind: torch.dtype, off: int) -> None:
    # 1 + half a unit is a tie; fp32 cannot hold what lies a hair beside it.
    half = float(torch.finfo(kind).eps) / 2
    base = torch.ones(1, 3).to(kind)
    down = torch.tensor([[half, half, half], [2.0**off, 0.0, -(2.0**off)]])
    found = rounded_sum(base, torch.ones(1, 2), down, kind)
    assert found.double().tolist() == [[1 + 2 * half, 1.0, 1.0]]


def test_subnormal_overflowing_and_odd_values_round_as_they_should() -> None:
    row = torch.tensor([[0.0, 6e-8, 3e-8, 2e-8, 65519.0, 65520.0, 6.1e-5, -0.0]])
    found = rounded_sum(row, torch.zeros(1, 1), torch.zeros(1, 8), torch.float16)
    expected = reference.round_once(row.double().numpy(), torch.float16)
    assert torch.equal(found, expected)
    odd = torch.tensor([[float("nan"), float("inf"), float("-inf")]])
    found = rounded_sum(odd, torch.zeros(1, 1), torch.zeros(1, 3), torch.float16)
    torch.testing.assert_close(found, odd.half(), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_views_other_dtypes_and_single_rows_are_the_same(kind: torch.dtype) -> None:
    base, up, down = parts(torch.float32, 5)
    whole = rounded_sum(base, up, down, kind)
    turned = rounded_sum(base.T.contiguous().T, up, down, kind)
    assert torch.equal(bits(turned), bits(whole))
    assert torch.equal(bits(rounded_sum(base.double(), up, down, kind)), bits(whole))
    for row in (0, 300):
        one = rounded_sum(base[row : row + 1], up[row : row + 1], down, kind)
        assert torch.equal(bits(one[0]), bits(whole[row]))


def test_what_is_rounded_to_odd_can_be_rounded_again() -> None:
    g = torch.Generator().manual_seed(0)
    powers = torch.randint(-30, 15, (4096,), generator=g)
    values = torch.randn(4096, generator=g).double() * 2.0**powers
    values += values.half().double().nan_to_num(0, 0, 0) * 2.0**-33
    found = to_odd(values)
    for kind in KINDS[:2]:
        assert torch.equal(found.to(kind), reference.round_once(values.numpy(), kind))
    assert torch.equal(to_odd(found.double()), found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_left_as_it_is(kind: torch.dtype) -> None:
    base, up, down = parts(kind, 3)
    before = base.clone()
    rounded_sum(base, up, down, kind)
    assert torch.equal(base, before)
