"""The mergekit flavor of the angular methods against mergekit 0.1.5, from factors alone."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method
from tests import reference
from tests.oracle.test_methods_twins import close, deltas, found

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
FP64 = 1e-10
"""Both in float64; theirs on dense matrices, ours on inner products."""


def mergekit(name: str, tensors: Sequence[Tensor], *, base: bool, **parameters: Any) -> Tensor:
    """Merge dense ΔW, beside a base of zeros where the method wants one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import TensorGroup
    ids = [f"lora{number}" for number in range(len(tensors))]
    if not base:
        group = TensorGroup.from_tensors(list(tensors), ids=ids)
    else:
        zeros = torch.zeros_like(tensors[0])
        group = TensorGroup.from_tensors([zeros, *tensors], ids=["base", *ids], base_index=0)
    return registry.get(name)([group], parameters=parameters)[0]  # type: ignore[no-any-return]


def given_of(count: int, seed: int = 0) -> list[Delta]:
    return deltas(strengths=(1.0,) * count, ranks=(4, 6, 3, 2, 5)[:count], seed=seed)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher(count: int) -> None:
    given = given_of(count)
    expected = mergekit("karcher", [dense(d.change) for d in given], base=False)
    close(found(Method(name="karcher", flavor="mergekit"), given), expected, FP64)


def test_karcher_knows_the_sign_of_a_strength_but_not_its_size() -> None:
    given = given_of(3)
    signs = (-0.3, 2.0, -1.0)
    turned = [Delta(change=d.change, strength=s, owner=d.owner)
              for d, s in zip(given, signs, strict=True)]  # fmt: skip
    tensors = [dense(d.change) * (1 if s > 0 else -1) for d, s in zip(given, signs, strict=True)]
    expected = mergekit("karcher", tensors, base=False)
    close(found(Method(name="karcher", flavor="mergekit"), turned), expected, FP64)


def test_karcher_with_a_change_of_zero() -> None:
    given = given_of(2)
    zero = Factors(up=torch.zeros(60, 1).double(), down=torch.zeros(1, 44).double())
    given.append(Delta(change=zero, strength=1.0, owner="zero"))
    expected = mergekit("karcher", [dense(d.change) for d in given], base=False)
    close(found(Method(name="karcher", flavor="mergekit"), given), expected, FP64)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_model_stock(count: int, seed: int) -> None:
    given = given_of(count, seed)
    tensors = [dense(d.change) for d in given]
    expected = mergekit("model_stock", tensors, base=True, filter_wise=False)
    close(found(Method(name="model-stock", flavor="mergekit"), given), expected, FP64)


WEIGHTS = [(1.0, 1.0), (0.3, 0.9), (2.0, 0.5), (1.0, -0.4), (-0.3, -0.9), (0.7, -0.7)]
"""The last three lead past the first, are the shares of 0.3 and 0.9, and are taken as even."""


@pytest.mark.parametrize("weights", WEIGHTS)
def test_slerp_is_their_nuslerp(weights: tuple[float, float]) -> None:
    given = deltas(strengths=weights)
    each = {f"lora{number}": weight for number, weight in enumerate(weights)}
    tensors = [dense(d.change) for d in given]
    expected = mergekit("nuslerp", tensors, base=True, weight=each)
    close(found(Method(name="slerp", flavor="mergekit"), given), expected, FP64)


def test_slerp_with_a_change_of_zero_is_their_nuslerp() -> None:
    one, _ = given_of(2)
    zero = Factors(up=torch.zeros(60, 1).double(), down=torch.zeros(1, 44).double())
    given = [one, Delta(change=zero, strength=0.5, owner="lora1")]
    each = {"lora0": 1.0, "lora1": 0.5}
    expected = mergekit("nuslerp", [dense(d.change) for d in given], base=True, weight=each)
    close(found(Method(name="slerp", flavor="mergekit"), given), expected, FP64)


@pytest.mark.parametrize("strength", [0.4, -3.0])
def test_karcher_of_one(strength: float) -> None:
    """mergekit's knows no weights: one tensor is itself, beside one of zero half of itself."""
    one = Delta(change=given_of(1)[0].change, strength=strength, owner="lora0")
    sign = 1 if strength > 0 else -1
    zero = Factors(up=torch.zeros(60, 1).double(), down=torch.zeros(1, 44).double())
    for given in ([one], [one, Delta(change=zero, strength=1.0, owner="zero")]):
        tensors = [sign * dense(d.change) for d in given]
        expected = mergekit("karcher", tensors, base=False)
        close(found(Method(name="karcher", flavor="mergekit"), given), expected, FP64)


def test_karcher_of_opposites_is_the_first() -> None:
    """Their mean has no direction; mergekit starts at the first, and no arc leads away from it."""
    one = given_of(1)[0].change
    given = [Delta(change=one, strength=s, owner=str(s)) for s in (1.0, -1.0)]
    expected = mergekit("karcher", [dense(one), -dense(one)], base=False)
    close(found(Method(name="karcher", flavor="mergekit"), given), expected, FP64)


def test_slerp_of_ours_and_theirs_differ_in_the_norm() -> None:
    """Their arc's coefficients are on the ΔW themselves, and are not multiplied by Σ|strength|."""
    given = given_of(2)
    ours, theirs = (found(Method(name="slerp", flavor=f), given) for f in ("lorakit", "mergekit"))
    norms = sum(float(dense(d.change).norm()) for d in given)
    assert float(ours.norm()) == pytest.approx(norms)
    assert reference.relative_error(theirs, ours) > 0.2
