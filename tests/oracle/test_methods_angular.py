"""The angular methods where ΔW cancel, oppose each other or are the same, and Pico before them."""

import pytest
import torch
from torch import Tensor

from lorakit.linalg.tiles import dense
from lorakit.methods.angular import stock_factor
from lorakit.methods.calibration import pico
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from tests import reference, twins
from tests.oracle.test_methods_subspace import factors_of, padded, regauged
from tests.oracle.test_methods_twins import FP64, STRENGTHS, close, deltas, found, plain, signed

ANGULAR = [name for name in MENU if MENU[name].family == "angular"]


@pytest.mark.parametrize("name", ANGULAR)
def test_how_they_are_factored_and_ordered_does_not_matter(name: str) -> None:
    given = deltas(strengths=(0.8, 0.5) if name == "slerp" else (0.8, 0.5, 1.2), seed=3)
    expected = found(Method(name=name), given)
    assert expected.any()
    turned = [regauged(delta, seed) for seed, delta in enumerate(given)]
    close(found(Method(name=name), turned), expected, FP64)
    close(found(Method(name=name), given[::-1]), expected, FP64)


def rounded(delta: Delta, kind: torch.dtype, strength: float) -> Delta:
    change = factors_of(delta)
    stored = type(change)(up=change.up.to(kind).double(), down=change.down.to(kind).double())
    return Delta(change=stored, strength=strength, owner="stored")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["slerp", "karcher"])
@pytest.mark.parametrize("strength", [-0.2, -0.5])
def test_the_rounding_of_a_file_is_no_arc(name: str, kind: torch.dtype, strength: float) -> None:
    """From a LoRA to the opposite of its copy in fp16 the arc would lead through the rounding."""
    one = deltas(strengths=(0.5,))[0]
    given = [one, rounded(one, kind, strength)]
    answer = found(Method(name=name), given)
    expected = dense(linear(given))
    assert float((answer - expected).norm()) < FP64 * float(dense(one.change).norm())


def test_an_opposite_pair_beside_a_third_has_a_mean() -> None:
    one, other, _ = deltas(strengths=(0.5, 0.6, 1.0))
    given = [one, Delta(change=one.change, strength=-0.5, owner="opposite"), other]
    answer = found(Method(name="karcher"), given)
    shares = [abs(d.strength) / 1.6 for d in given]
    unit = answer / answer.norm()
    assert twins.karcher_gradient(unit, signed(given), shares) < 1e-9
    norms = sum(float(x.norm()) for x in signed(given))
    assert float(answer.norm()) == pytest.approx(norms)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_karcher_stands_still_for_many(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    strengths = tuple((torch.rand(count, generator=generator) * 2 - 1).tolist())
    given = deltas((12, 9), strengths, ranks=(3,) * count, seed=count)
    answer = found(Method(name="karcher"), given)
    shares = [abs(s) / sum(map(abs, strengths)) for s in strengths]
    assert twins.karcher_gradient(answer / answer.norm(), signed(given), shares) < 1e-12


def test_model_stock_leaves_nothing_of_loras_that_oppose_each_other() -> None:
    one, other, _ = deltas(strengths=(1.0, 1.0, 1.0))
    against = [one, Delta(change=one.change, strength=-1.0, owner="against"), other]
    assert stock_factor(against) == 0.0 and stock_factor(against, clamped=False) < 0
    assert not found(Method(name="model-stock"), against).any()
    alike = [Delta(change=one.change, strength=1.0, owner=str(i)) for i in range(3)]
    assert stock_factor(alike) == pytest.approx(1.0)


def test_matrices_and_factors_have_the_same_angles() -> None:
    given = deltas(strengths=(0.8, 0.5, 1.2), seed=3)
    mixed = [Delta(change=x, strength=d.strength, owner=d.owner)
             for x, d in zip(plain(given), given, strict=True)]  # fmt: skip
    for stack in (mixed, [mixed[0], *given[1:]]):
        for name in ("karcher", "model-stock"):
            expected = found(Method(name=name), given)
            close(found(Method(name=name), stack), expected, FP64)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["linear", *ANGULAR])
def test_pico_comes_before_every_method(name: str, kind: torch.dtype) -> None:
    strengths = (0.8, 0.5) if name == "slerp" else (0.8, 0.5, 1.2)
    given = deltas(strengths=strengths, kind=kind, seed=3)
    calibrated = [
        Delta(change=x, strength=d.strength, owner=d.owner)
        for x, d in zip(twins.pico(plain(given), list(strengths)), given, strict=True)
    ]
    expected = found(Method(name=name), calibrated)
    mean = sum(float(x.norm()) for x in signed(given)) / len(given)
    expected *= mean / expected.norm()
    tolerance = FP64 if kind == torch.float64 else 1e-5
    close(found(Method(name=name, calibrate="pico"), given), expected, tolerance)


def test_pico_does_not_know_how_a_lora_is_factored() -> None:
    given = deltas()

    def calibrated(stack: list[Delta]) -> Tensor:
        return torch.cat([dense(delta.change) for delta in pico(stack)])

    expected = calibrated(given)
    turned = [regauged(delta, seed) for seed, delta in enumerate(given)]
    close(calibrated(turned), expected, 1e-9)
    close(calibrated([padded(delta, 5) for delta in given]), expected, 1e-7)
    assert reference.relative_error(expected, torch.cat(plain(given))) > 0.05
    negated = [Delta(change=d.change, strength=-d.strength, owner=d.owner) for d in given]
    close(calibrated(negated), expected, FP64)
    assert [d.strength for d in pico(given)] == list(STRENGTHS)
