"""One LoRA several times, in its own factors or in others: nothing is left to its last bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorakit.adapters import Lora
from lorakit.errors import UnmatchedError
from lorakit.linalg.factored import Factors
from lorakit.lorafile import LoraFile
from lorakit.methods.delta import Delta, alone
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.methods.sameness import unified
from lorakit.operations.merge import merge
from lorakit.operations.owners import content, likeness, owners_of
from lorakit.operations.strength import Strength
from tests.helpers import weighted, worst_error
from tests.properties.test_method_invariants import (
    AVERAGING,
    EXACT,
    FULL,
    SPACED,
    A,
    B,
    C,
    each_method,
    in_each_space,
    merged,
    of,
)

GAUGES = [4.0, 10.0, -0.3]
RANDOM = [(name, space) for name, space in SPACED if MENU[name].random]


def rewritten(file: LoraFile, gauge: float) -> LoraFile:
    """Write the same ΔW as (gauge · up, down / gauge)."""
    adapters = {}
    for module, adapter in file.adapters.items():
        assert isinstance(adapter, Lora)
        adapters[module] = replace(adapter, up=adapter.up * gauge, down=adapter.down / gauge)
    return replace(file, adapters=adapters, sha256=f"{gauge}")


@in_each_space
def test_a_mean_of_copies_is_the_lora_itself(name: str, space: str | None) -> None:
    for copies in (2, 3, 8):
        if name == "slerp" and copies > 2:
            continue
        stack = [(rewritten(A, (-0.3) ** n), 0.37) for n in range(copies)]
        method = Method(name=name, space=space, normalize=True)
        assert worst_error(merged(stack, method), of(A)) < EXACT


@in_each_space
@pytest.mark.parametrize("gauge", GAUGES)
def test_a_copy_in_other_factors_is_a_copy(name: str, space: str | None, gauge: float) -> None:
    method = Method(name=name, space=space)
    found = merged([(A, 1.0), (rewritten(A, gauge), 0.5)], method, FULL)
    expected = merged([(A, 1.0), (A, 0.5)], method, FULL)
    assert worst_error(found, expected) < 2 * EXACT
    # sce weighs a copy by the square of its strength, as its energy is.
    times = 0.9 if name == "sce" else 0.75 if name in AVERAGING else 1.5
    assert worst_error(expected, weighted([(of(A), times)])) < 2 * EXACT


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("space", ["full", "core", "knots"])
@pytest.mark.parametrize("name", ["ties", "dare-ties", "della-ties", "breadcrumbs-ties", "sce"])
def test_a_lora_against_its_copy_elects_nothing(name: str, space: str, gauge: float) -> None:
    """Their last bits differ, and would elect a sign for each element."""
    stack = [(A, 1.0), (rewritten(A, gauge), -1.0)]
    with pytest.raises(UnmatchedError, match="Nothing is left"):
        merge(stack, method=Method(name=name, space=space))


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(("name", "space"), RANDOM)
def test_masks_do_not_know_how_a_lora_is_factored(
    name: str, space: str | None, gauge: float
) -> None:
    method = Method(name=name, space=space)
    found = merged([(rewritten(A, gauge), 0.8), (B, -0.5), (C, 1.2)], method, FULL)
    expected = merged([(A, 0.8), (B, -0.5), (C, 1.2)], method, FULL)
    assert worst_error(found, expected) < 20 * EXACT
    other = merged([(A, 0.8), (B, -0.5), (C, 1.2)], replace(method, seed=1), FULL)
    assert worst_error(other, expected) > 0.1


@pytest.mark.parametrize("factor", [3.0, -1.0, 0.01])
@pytest.mark.parametrize(("name", "space"), RANDOM)
def test_the_masks_of_one_lora_twice_stay_with_their_strengths(
    name: str, space: str | None, factor: float
) -> None:
    """Sorted as texts, 4 and 6 change places where both are doubled; so do 0.3 and -0.7."""
    method, strengths = Method(name=name, space=space), (4.0, 6.0, -0.7)
    files = (A, A, B)
    once = merged(list(zip(files, strengths, strict=True)), method, FULL)
    scaled = merged([(f, factor * s) for f, s in zip(files, strengths, strict=True)], method, FULL)
    assert worst_error(scaled, weighted([(once, factor)])) < 2 * EXACT


def test_likeness_is_of_what_is_changed_and_content_of_the_bytes() -> None:
    again = rewritten(A, 10.0)
    assert likeness(again) == likeness(A) and content(again) != content(A)
    assert likeness(rewritten(A, -7.1)) == likeness(A)
    half = {
        m: replace(a, up=a.up.half(), down=a.down.half())  # type: ignore[type-var]
        for m, a in A.adapters.items()
    }
    assert likeness(replace(A, adapters=half)) == likeness(A)
    assert len({likeness(file) for file in (A, B, C)}) == 3
    twice = {m: replace(a, alpha=2 * a.alpha) for m, a in A.adapters.items()}  # type: ignore[attr-defined,type-var]
    assert likeness(replace(A, adapters=twice)) != likeness(A)


def test_each_use_has_a_name_of_its_own_in_the_order_of_its_size() -> None:
    stack = [(A, 6.0), (B, 1.0), (A, -4.0), (A, Strength(unet=5.0, te=-5.0))]
    for random in (True, False):
        names = owners_of(stack, random=random)
        assert len(set(names)) == 4
        assert names[0] == names[2] + "#3" and names[3] == names[2] + "#2"
        assert owners_of(stack[::-1], random=random) == names[::-1]


def change(seed: int, shape: tuple[int, int] = (60, 44)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1])
    return Factors(up=up.double(), down=down.double())


def delta(change: Factors | Tensor) -> Delta:
    return Delta(change=change, strength=1.0)


@pytest.mark.parametrize("dense", [False, True])
def test_equal_changes_are_one_and_others_are_not(dense: bool) -> None:
    one = change(0)
    near = Factors(up=one.up * (1 + 1e-8), down=one.down)
    half = Factors(up=one.up.half().double(), down=one.down)
    corner = Factors(up=one.up.clone(), down=one.down)
    corner.up[1] *= 1 + 1e-3
    opposite = Factors(up=one.up * -3.1, down=one.down / 3.1)
    for other, sign in ((near, 1), (opposite, -1), (half, 0), (corner, 0), (change(1), 0)):
        x: Factors | Tensor = other.up @ other.down if dense else other
        found = unified([delta(one), delta(x)])
        assert alone(found) == (sign != 0)
        assert found[0].change is one and (found[1].change is one) == (sign != 0)
        assert [d.strength for d in found] == [1.0, sign or 1.0]
    zero = torch.zeros(60, 44)
    assert alone(unified([delta(zero), delta(zero.clone())]))


@each_method
def test_a_small_factor_loses_nothing(name: str) -> None:
    """What the factor makes small is not the rounding of what was summed."""
    stack = [(A, 0.8), (B, -0.5)]
    if name == "model-stock":
        stack = [(A, 0.8), (A, 0.5)]
    once = merged(stack, Method(name=name), FULL)
    for lambda_ in (1e-8, 1e8):
        small = merged(stack, Method(name=name, lambda_=lambda_), FULL)
        assert worst_error(small, weighted([(once, lambda_)])) < 2 * EXACT
    large = merged([(f, 1e9 * s) for f, s in stack], Method(name=name, normalize=True), FULL)
    mean = merged(stack, Method(name=name, normalize=True), FULL)
    assert worst_error(large, mean) < 2 * EXACT


def test_a_norm_that_is_asked_for_lifts_no_rounding() -> None:
    """Two LoRAs less their merge cancel but for the last bits of its factors."""
    both, _ = merge([(A, 1.0), (B, 1.0)])
    stack = [(A, 1.0), (B, 1.0), (replace(both, sha256="both"), -1.0)]
    for options in ({}, {"match_norm": "mean"}, {"match_norm": "mean", "name": "iso-c"}):
        with pytest.raises(UnmatchedError, match="Nothing is left"):
            merge(stack, method=Method(**options))  # type: ignore[arg-type]
    (alone, _) = merge(stack[:2], method=Method(match_norm="mean"))
    assert set(alone.adapters) == set(A.adapters)
