"""Every adapter's ΔW against the plain formula in float64."""

import pytest
import torch
from torch import Tensor

from lorakit.adapters.lora import Lora, build
from lorakit.errors import AdapterError, NumericsError
from lorakit.linalg.factored import dense
from tests import reference
from tests.helpers import FP32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "linear": ((24, 4), (4, 40), None),
    "1x1": ((24, 4, 1, 1), (4, 40, 1, 1), None),
    "3x3": ((24, 4, 1, 1), (4, 40, 3, 3), None),
    "5x1": ((24, 4, 1, 1), (4, 40, 5, 1), None),
    "tucker": ((24, 4, 1, 1), (4, 40, 1, 1), (4, 4, 3, 3)),
    "tucker of two ranks": ((24, 3, 1, 1), (4, 40, 1, 1), (3, 4, 3, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_delta_is_alpha_over_rank_times_up_times_down(name: str, dtype: torch.dtype) -> None:
    up, down, mid = (
        None if shape is None else random(*shape, seed=i).to(dtype)
        for i, shape in enumerate(SHAPES[name])
    )
    assert up is not None and down is not None
    tensors = {"up": up, "down": down, "alpha": torch.tensor(2.0)}
    adapter = build(tensors if mid is None else tensors | {"mid": mid}, None)
    expected = reference.delta(up, down, 2.0, mid)

    def check(answer: Tensor) -> None:
        assert reference.relative_error(answer, expected.flatten(1)) < FP32

    assert adapter.shape == tuple(expected.shape)
    reference.negative_control(check, dense(adapter.change()))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (torch.tensor(2.0), 0.5),
        (torch.tensor(2, dtype=torch.int64), 0.5),
        (torch.tensor([2.0], dtype=torch.float16), 0.5),
        (torch.tensor(0.0), 0.0),
        (None, 1.0),
    ],
)
def test_alpha_may_be_a_float_an_integer_or_missing(alpha: Tensor | None, expected: float) -> None:
    tensors = {"up": random(8, 4), "down": random(4, 8)}
    assert build(tensors if alpha is None else tensors | {"alpha": alpha}, None).scale == expected


@pytest.mark.parametrize("strength", [0.5, -0.5, 3.0, -1.0])
def test_scaling_is_linear_and_keeps_the_bytes_of_down(strength: float) -> None:
    lora = Lora(up=random(8, 4).half(), down=random(4, 8).half(), alpha=2.0)
    scaled = lora.scaled(strength)
    expected = dense(lora.change()) * strength
    assert reference.relative_error(dense(scaled.change()), expected) < FP32
    assert torch.equal(scaled.down, lora.down)
    assert torch.equal(scaled.up.abs(), lora.up.abs())
    assert scaled.alpha >= 0, "diffusers splits a negative alpha by powers of two for ever"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"up": random(8, 4)}, "no lora_down"),
        ({"down": random(8, 4)}, "no lora_up"),
        ({"alpha": torch.tensor(1.0)}, "no lora_up"),
        ({"up": random(8, 4), "down": random(5, 8)}, "one rank in both factors"),
        ({"up": random(8, 4, 3, 3), "down": random(4, 8, 1, 1)}, "1x1 kernel in lora_up"),
        ({"up": random(8), "down": random(8)}, "matrices or kernels"),
        ({"up": random(8, 0), "down": random(0, 8)}, "matrices or kernels"),
        ({"up": torch.ones(8, 4, dtype=torch.int64), "down": random(4, 8)}, "expected floats"),
        ({"up": random(8, 4), "down": random(4, 8), "alpha": random(2)}, "one number as alpha"),
        (
            {"up": random(8, 4, 1, 1), "down": random(4, 8, 1, 1), "mid": random(5, 4, 3, 3)},
            "Tucker core",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        build(tensors, None)


@pytest.mark.parametrize("role", ["up", "down", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(role: str, value: float) -> None:
    tensors = {"up": random(8, 4), "down": random(4, 8), "alpha": torch.tensor(1.0)}
    tensors[role].view(-1)[-1] = value
    with pytest.raises(NumericsError, match=f"in its {role}"):
        build(tensors, None)
