"""The elementwise methods against mergekit and PEFT where conventions decide: ties and bounds."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.elementwise import elementwise
from lorakit.methods.method import Method
from lorakit.methods.table import combine
from tests import reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    sparsify = pytest.importorskip("mergekit.sparsify")
    gta = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    base = pytest.importorskip("mergekit.merge_methods.base")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
FP32 = 1e-5
"""Both sum a few terms in fp32."""
WEIGHTS = (1.0, -1.0, 0.5)


def factors(rows: int = 600, columns: int = 500, count: int = 3) -> list[Factors]:
    """Over 2^17 elements: thresholds are found by sample and bracket."""
    generator = torch.Generator().manual_seed(3)
    return [
        Factors(
            up=torch.randn(rows, 6, generator=generator),
            down=torch.randn(6, columns, generator=generator),
        )
        for _ in range(count)
    ]


def ours(
    name: str, changes: Sequence[Factors | Tensor], strengths: Sequence[float], **options: Any
) -> Tensor:
    method = Method(name=name, **options).filled(into_lora=False)
    deltas = [
        Delta(change=change, strength=strength, owner=str(number))
        for number, (change, strength) in enumerate(zip(changes, strengths, strict=True))
    ]
    return dense(elementwise(deltas, method=method, module="layer", cuts={}))


def mergekit(
    name: str, tensors: Sequence[Tensor], strengths: Sequence[float], **more: Any
) -> Tensor:
    ids = [str(number) for number in range(len(tensors))]
    group = base.TensorGroup.from_tensors(
        [torch.zeros_like(tensors[0]), *tensors], ids=["base", *ids], base_index=0
    )
    if name != "sce":
        more["weight"] = dict(zip(ids, strengths, strict=True))
    return registry.get(name)([group], parameters=more)[0]  # type: ignore[no-any-return]


def same(answer: Tensor, expected: Tensor) -> None:
    def check(value: Tensor) -> None:
        atol = FP32 * float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=FP32, atol=atol)

    reference.negative_control(check, answer)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.7])
def test_what_is_kept_by_magnitude(density: float) -> None:
    changes = factors(count=1)
    whole = dense(changes[0])
    trimmed = sparsify.magnitude(whole, density)
    same(ours("ties", changes, [1.0], density=density, flavor="mergekit"), trimmed)
    pruned = merge_utils.prune(whole, density, "magnitude")
    same(ours("magnitude", changes, [1.0], density=density, flavor="peft"), pruned)
    assert torch.equal(trimmed != 0, pruned != 0)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("density", [0.3, 0.9, 0.995])
def test_what_is_left_out_as_an_outlier(density: float, gamma: float) -> None:
    changes = factors(count=1)
    expected = sparsify.magnitude_outliers(dense(changes[0]), density, gamma=gamma)
    answer = ours("breadcrumbs", changes, [1.0], density=density, gamma=gamma, flavor="mergekit")
    same(answer, expected)


def test_breadcrumbs_of_few_elements() -> None:
    """int(0.01 · 64) is 0 outliers, not all of them, as in mergekit before 0.1.5."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    answer = ours("breadcrumbs", [x], [1.0], density=0.9, gamma=0.01, flavor="mergekit")
    assert int((answer != 0).sum()) == 57
    same(answer, sparsify.magnitude_outliers(x, 0.9, gamma=0.01))


def test_a_density_below_one_element() -> None:
    """mergekit keeps one element then, as we do; PEFT keeps none."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    one = sparsify.magnitude(x, 0.1)
    assert torch.equal(ours("ties", [x], [1.0], density=0.1, flavor="mergekit"), one)
    none = merge_utils.ties([x], torch.ones(1), density=0.1)
    assert torch.equal(ours("ties", [x], [1.0], density=0.1, flavor="peft"), none)
    assert not none.any()


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs-ties"])
def test_breadcrumbs_below_one_element(name: str) -> None:
    """mergekit keeps none then, though one by magnitude; ours keeps one."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    none = mergekit(name.replace("-", "_"), [x], [1.0], density=0.01, gamma=0.1)
    assert torch.equal(ours(name, [x], [1.0], density=0.01, gamma=0.1, flavor="mergekit"), none)
    assert not none.any()
    y = 0.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    assert int((ours(name, [x, y], [1.0] * 2, density=0.01, gamma=0.1) != 0).sum()) == 2


@pytest.mark.parametrize("name", ["ties", "breadcrumbs-ties"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.3), WEIGHTS])
def test_signs_that_cancel_exactly(name: str, weights: tuple[float, ...]) -> None:
    """Whole numbers and a LoRA against its negative: the sign of a sum of zero is +."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-3, 4, (30, 40), generator=generator).float()
    tensors = [x, -x, torch.randint(-2, 3, (30, 40), generator=generator).float()]
    signs = {"normalize": True} if name == "breadcrumbs-ties" else {}
    same(
        ours(name, tensors, weights, density=1.0, flavor="mergekit", **signs),
        mergekit(name.replace("-", "_"), tensors, weights, density=1.0, **signs),
    )
    same(
        ours("ties", tensors, weights, density=1.0, flavor="peft"),
        merge_utils.ties(tensors, torch.tensor(weights), density=1.0),
    )


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.25), (-1.0, -0.5, 0.1), (1.0, -0.75, -0.25)])
def test_a_plain_sum_is_divided_by_the_sum_of_its_weights(weights: tuple[float, ...]) -> None:
    changes = factors(30, 40)
    deltas = [
        Delta(change=c, strength=w, owner=str(w)) for c, w in zip(changes, weights, strict=True)
    ]
    method = Method(name="linear", normalize=True, flavor="mergekit").filled(into_lora=False)
    answer = dense(combine(deltas, method, module="layer")).float()
    tensors = [dense(change) for change in changes]
    same(answer, mergekit("task_arithmetic", tensors, weights, normalize=True))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.25), WEIGHTS, (1.0, -0.75, -0.25)])
@pytest.mark.parametrize("name", ["dare-linear", "dare-ties", "breadcrumbs", "breadcrumbs-ties"])
def test_normalize(name: str, weights: tuple[float, ...], normalize: bool) -> None:
    """mergekit divides by the sum of the weights; where that is nothing it does not divide."""
    changes = factors(30, 40)
    same(
        ours(name, changes, weights, density=1.0, normalize=normalize, flavor="mergekit"),
        mergekit(
            name.replace("-", "_"),
            [dense(change) for change in changes],
            weights,
            density=1.0,
            normalize=normalize,
        ),
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (1.0, -0.5, 0.25, 2.0)])
def test_mergekit_s_count_of_signs(
    weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of its methods offers it, but the code is there."""
    tensors = [dense(change) for change in factors(30, 40, 4)]
    by_sum = gta.get_mask
    monkeypatch.setattr(gta, "get_mask", lambda delta, **other: by_sum(delta, method="count"))
    expected = mergekit("ties", tensors, weights, density=0.6)
    same(
        ours("ties", tensors, weights, density=0.6, votes="frequency", flavor="mergekit"), expected
    )


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_sce_of_any_size(size: float, density: float) -> None:
    """Mean squares below 1e-6 in sum, as many LoRAs have them, count alike in mergekit."""
    changes = [
        Factors(up=c.up * size * (n + 1), down=c.down) for n, c in enumerate(factors(30, 40))
    ]
    changes = [Factors(up=c.up * 0.1, down=c.down) for c in changes]
    tensors = [dense(change) for change in changes]
    answer = ours("sce", changes, [1.0] * 3, density=density, flavor="mergekit")
    same(answer, mergekit("sce", tensors, [], select_topk=density))


def test_sce_of_a_lora_that_hardly_counts() -> None:
    """A weight below 1e-6 is divided by 1e-6: where it agrees alone, little is left."""
    tensors = [dense(change) for change in factors(30, 40, 2)]
    tensors[1] *= 1e-4
    tensors[0][:10] = 0.0
    answer = ours("sce", tensors, [1.0] * 2, flavor="mergekit")
    same(answer, mergekit("sce", tensors, []))
    alone = torch.where(answer[:10] != 0, answer[:10] / tensors[1][:10], 0.0)
    assert 0 < float(alone.max()) < 0.1


@pytest.mark.parametrize("count", [3, 5, 8])
def test_sce_of_equal_loras_takes_no_rounding_for_a_difference(count: int) -> None:
    """The mean of three equal numbers is off by a last bit: mergekit's variance is 0 all the same.

    Of what does not differ at all mergekit keeps nothing.
    """
    tensors = [dense(change) for change in factors(30, 40, 1)] * count
    answer = ours("sce", tensors, [1.0] * count, density=0.5, flavor="mergekit")
    assert torch.equal(answer, mergekit("sce", tensors, [], select_topk=0.5))
    assert not answer.any()
    tensors[0] = tensors[0] + 1e-5 * tensors[0].abs().max()
    same(
        ours("sce", tensors, [1.0] * count, density=1.0, flavor="mergekit"),
        mergekit("sce", tensors, [], select_topk=1.0),
    )


def test_sce_where_the_loras_agree_in_most_places() -> None:
    """The share is of the elements whose variance is not zero."""
    tensors = [dense(change) for change in factors(30, 40, 2)]
    tensors[1][5:] = tensors[0][5:]
    answer = ours("sce", tensors, [1.0] * 2, density=0.5, flavor="mergekit")
    expected = mergekit("sce", tensors, [], select_topk=0.5)
    same(answer, expected)
    assert int((answer != 0).sum()) == 100
