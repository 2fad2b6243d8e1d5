"""The one rounding: to nearest, ties to even, and never silently to infinity."""

import math

import numpy as np
import pytest
import torch

from lorakit.errors import NumericsError
from lorakit.tensorfile.casting import cast, stored
from lorakit.tensorfile.source import DictSource, torch_dtype


class Changed:
    """A source derived from another, with some values computed."""

    def __init__(self, base, values, dtype=None):
        self.base = base
        self.values = values
        self.name = base.name
        self.metadata = base.metadata
        self.specs = {**base.specs, **(dtype or {})}

    def get(self, key):
        return self.values[key] if key in self.values else self.base.get(key)

    def extent(self, key):
        return None


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("F16", 65520.0),
        ("BF16", 3.4e38),
        ("F8_E4M3", 464.5),
        ("F8_E4M3", -500.0),
        ("F8_E5M2", 61440.0),
        ("F8_E4M3FNUZ", 400.0),
        ("F8_E5M2FNUZ", 1e6),
    ],
)
def test_overflow_names_the_layer_and_the_remedy(dtype, value):
    tensor = torch.tensor([0.0, 1.0, value])
    with pytest.raises(NumericsError, match=f"unet.to_q: .* overflows {dtype}; use --dtype fp32"):
        cast(tensor, dtype, "unet.to_q")


@pytest.mark.parametrize(
    ("dtype", "value", "largest"),
    [
        ("F16", 65519.0, 65504.0),
        ("F8_E4M3", 464.0, 448.0),
        ("F8_E4M3", -455.0, -448.0),
        ("F8_E5M2", 61439.0, 57344.0),
    ],
)
def test_what_rounds_to_the_largest_number_fits(dtype, value, largest):
    assert float(cast(torch.tensor([value]), dtype, "x").float()) == largest


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64])
def test_nan_and_infinity_are_refused_whatever_the_dtypes(dtype, bad, source):
    tensor = torch.tensor([1.0, bad, 2.0], dtype=source)
    with pytest.raises(NumericsError, match="x: expected finite values, found 1"):
        cast(tensor, dtype, "x")


def adversarial() -> torch.Tensor:
    """Float64 values a little beside the ties of every narrow dtype."""
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(2000, generator=generator, dtype=torch.float64)]
    for bits in (3, 4, 8, 11):
        whole = torch.randint(2 ** (bits - 1), 2**bits, (200,), generator=generator).double()
        for nudge in (0.0, 2.0**-30, -(2.0**-30), 2.0**-45, -(2.0**-45)):
            tie = (whole + 0.5) * (1 + nudge) / 2**bits
            values += [tie, -tie, tie * 2.0**-18]
    return torch.cat(values)


def nearest(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The twin: of all the numbers that a dtype has, the nearest; of two, the even one."""
    step = torch.uint8 if dtype.itemsize == 1 else torch.int16
    count = 128 if dtype.itemsize == 1 else 32768
    codes = torch.arange(count, dtype=torch.int32).to(step)
    numbers = codes.view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    index = torch.searchsorted(numbers, value.abs()).clamp(1, len(numbers) - 1)
    low, high = numbers[index - 1], numbers[index]
    below, above = value.abs() - low, high - value.abs()
    up = (above < below) | ((above == below) & (index % 2 == 0))
    return torch.where(up, high, low).copysign(value)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("given", [torch.float64, torch.float32])
def test_it_rounds_once_to_the_nearest(dtype, given):
    values = adversarial().to(given)
    result = cast(values, dtype, "x").double()
    expected = nearest(values.double(), torch_dtype(dtype))
    assert torch.equal(result, expected)
    assert not torch.equal(0.9 * result, expected)


def test_the_twin_is_numpys_rounding_and_two_roundings_are_not():
    values = adversarial()
    once = torch.from_numpy(values.numpy().astype(np.float16)).double()
    assert torch.equal(nearest(values, torch.float16), once)
    assert not torch.equal(values.float().half().double(), once)


def test_integers_are_not_rounded_to():
    with pytest.raises(NumericsError, match="ids: expected a floating dtype"):
        cast(torch.tensor([1.5]), "I64", "ids")
    ids = torch.arange(3)
    assert cast(ids, "I64", "ids") is ids


def test_a_mask_of_infinities_passes_where_it_was_so_before():
    mask = torch.full((3, 3), -math.inf).triu(1)
    base = DictSource({"mask": mask, "x": torch.ones(2)})
    same = Changed(base, {})
    assert torch.equal(stored(same, "mask"), mask)
    half = {"mask": DictSource({"m": mask.half()}).specs["m"]}
    assert torch.equal(stored(Changed(base, {}, half), "mask"), mask.half())
    assert torch.equal(stored(base, "mask"), mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_new_infinity_or_nan_is_refused(bad):
    base = DictSource({"x": torch.ones(2)}, name="base.safetensors")
    changed = Changed(base, {"x": torch.tensor([1.0, bad])})
    with pytest.raises(NumericsError, match=r"base\.safetensors: x: expected finite"):
        stored(changed, "x")


def test_a_computed_tensor_of_another_shape_is_refused():
    base = DictSource({"x": torch.ones(2)}, name="base")
    with pytest.raises(NumericsError, match=r"base: x expected \[2\], found \[3\]"):
        stored(Changed(base, {"x": torch.ones(3)}), "x")
