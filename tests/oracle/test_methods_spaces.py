"""The core and KnOTS spaces: what makes their bases, and what does not."""

from collections.abc import Callable, Sequence

import pytest
import torch

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Change, dense
from lorakit.methods.cores import cores_of
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.methods.method import Method
from lorakit.methods.spaces import in_core, in_knots
from tests import reference
from tests.oracle.test_methods_subspace import factors_of, padded, regauged
from tests.oracle.test_methods_twins import SHAPES, close, deltas, found, signed

Space = Callable[[Sequence[Delta], Callable[[Sequence[Delta]], Change]], Factors]
SPACES = pytest.mark.parametrize("space", ["core", "knots"])
FP64 = 1e-12
"""Orthonormal bases and one product on each side."""


@SPACES
@pytest.mark.parametrize("name", ["ties", "magnitude", "breadcrumbs-ties", "sce"])
def test_neither_a_basis_of_the_factors_nor_their_number_matters(name: str, space: str) -> None:
    given, method = deltas(), Method(name=name, space=space)
    expected = found(method, given)
    turned = [regauged(delta, seed) for seed, delta in enumerate(given)]
    close(found(method, turned), expected, 1e-8)
    close(found(method, [padded(delta, 5) for delta in given]), expected, 1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", [in_core, in_knots])
def test_the_sum_comes_back_as_it_was(space: Space, shape: tuple[int, int]) -> None:
    given = deltas(shape)
    merged = space(given, linear)
    close(dense(merged), torch.stack(signed(given)).sum(0), FP64)
    assert merged.rank <= min(*shape, 13)


@SPACES
@pytest.mark.parametrize("name", ["ties", "dare-ties", "sce", "breadcrumbs-ties"])
def test_a_lora_and_its_opposite_elect_no_sign(name: str, space: str) -> None:
    """The last bits of two cores that should be the same would give the whole LoRA back."""
    one = deltas()[0].change
    uses = zip(("lora", "lora#2"), (1.0, -1.0), strict=True)
    given = [Delta(change=one, strength=strength, owner=owner) for owner, strength in uses]
    assert not found(Method(name=name, space=space), given).any()


@SPACES
@pytest.mark.parametrize("name", ["ties", "magnitude", "breadcrumbs"])
def test_a_copy_in_other_factors_brings_no_directions(name: str, space: str) -> None:
    """In fp32 (10 · up, down / 10) differs by rounding: it would double the sides of the core."""
    one = factors_of(deltas(kind=torch.float32)[0])
    other = Factors(up=one.up * 10, down=one.down / 10)
    assert cores_of([one, other]).cores[0].shape == (4, 4)
    method = Method(name=name, space=space)
    copies = [[Delta(change=c, strength=1.0, owner=str(i)) for i, c in enumerate((one, second))]
              for second in (one, other)]  # fmt: skip
    exact, rounded = (found(method, given) for given in copies)
    assert reference.relative_error(rounded, exact) < 1e-5


@SPACES
def test_a_strength_changes_no_basis(space: str) -> None:
    """Twice the strengths and one LoRA written twice as large at half its strength."""
    given, method = deltas(), Method(name="ties", space=space)
    once = found(method, given)
    twice = [Delta(change=d.change, strength=2 * d.strength, owner=d.owner) for d in given]
    close(found(method, twice), 2 * once, FP64)
    if space == "core":
        strong = factors_of(given[0])
        larger = Factors(up=2 * strong.up, down=strong.down)
        cores = [cores_of([c, *(d.change for d in given[1:])]).cores for c in (strong, larger)]
        for found_core, expected in zip(cores[1], cores[0], strict=True):
            factor = 2 if found_core is cores[1][0] else 1
            torch.testing.assert_close(found_core.abs(), factor * expected.abs())


@pytest.mark.parametrize("space", [in_core, in_knots])
def test_a_faint_lora_keeps_its_directions(space: Space) -> None:
    one, other, _ = deltas()
    weak = Factors(up=factors_of(other).up * 1e-9, down=factors_of(other).down)
    faint = Delta(change=weak, strength=1e9, owner="faint")
    merged = dense(space([one, faint], lambda ds: linear(ds[1:])))
    # Beside a LoRA that is 1e9 times as large 7 of the 16 digits are left.
    close(merged, dense(other.change), 1e-5)
