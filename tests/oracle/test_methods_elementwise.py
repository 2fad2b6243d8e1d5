"""The elementwise methods against their formulas in float64: every flavor, vote and scope."""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.linalg import tiles
from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import Tiled, dense
from lorakit.methods.delta import Delta
from lorakit.methods.elementwise import elementwise
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from tests import reference
from tests import twins_elementwise as twins

MODULE = "unet.some.layer"
SHAPE = (40, 27)
STRENGTHS = (0.8, -0.5, 1.2)
FP64, FP32 = 1e-13, 1e-5
NAMES = [name for name in MENU if MENU[name].family == "elementwise"]
OTHERS = [name for name in NAMES if name != "sce"]
SUMS = [name for name in NAMES if not MENU[name].votes]
FLAVORED = [(name, flavor) for name in OTHERS for flavor in MENU[name].flavors]

each_method = pytest.mark.parametrize("name", NAMES)


def factors(
    shape: tuple[int, int] = SHAPE, ranks: Sequence[int] = (4, 6, 3), seed: int = 0
) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, rank in enumerate(ranks):
        up = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
        down = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
        made.append(Factors(up=(up * (number + 1)).float(), down=down.float()))
    return made


def given(
    changes: Sequence[Factors | Tensor], strengths: Sequence[float] = STRENGTHS
) -> list[Delta]:
    return [
        Delta(change=change, strength=strength, owner=f"lora{number}")
        for number, (change, strength) in enumerate(zip(changes, strengths, strict=False))
    ]


def matrices(changes: Sequence[Factors]) -> list[Tensor]:
    return [change.up.double() @ change.down.double() for change in changes]


def strong(x: list[Tensor]) -> list[Tensor]:
    return [strength * matrix for strength, matrix in zip(STRENGTHS, x, strict=True)]


def found(method: Method, deltas: Sequence[Delta], module: str = MODULE) -> Tensor:
    filled = method.filled(into_lora=False)
    return dense(elementwise(deltas, method=filled, module=module, cuts={})).double()


def expected(method: Method, x: list[Tensor], strengths: Sequence[float] = STRENGTHS) -> Tensor:
    m, s = method.filled(into_lora=False), list(strengths)
    least, density = 0 if m.flavor == "peft" else 1, m.density or 1.0
    if density == 1.0:
        kept = x
    elif MENU[m.name].random:
        kept = []
        for number, matrix in enumerate(x):
            lane = twins.lanes(m.name, m.seed or 0, f"lora{number}", MODULE, matrix.numel())
            mask, chance = twins.drop(matrix, lane, density, m.epsilon)
            kept.append(twins.thinned(matrix, mask, chance, m.flavor))
    else:
        trim = twins.trim_rows if m.scope == "row" else twins.trim
        kept = [trim(matrix, density, m.gamma or 0.0, least) for matrix in x]
    if not MENU[m.name].votes:
        return twins.summed(kept, s, m.flavor, m.normalize)
    mean = m.flavor == "mergekit" and m.name in twins.MEANS
    return twins.vote(kept, s, m.flavor, m.votes or "mass", m.normalize or mean)


def close(answer: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        answer, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
    )


def same(answer: Tensor, wanted: Tensor, tolerance: float) -> None:
    reference.negative_control(lambda value: close(value, wanted, tolerance), answer)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("strengths", [STRENGTHS, (1.0, 1.0, 1.0), (0.7,), (-0.3, -0.3)])
@pytest.mark.parametrize(("name", "flavor"), FLAVORED)
def test_every_flavor(
    name: str, flavor: str, strengths: tuple[float, ...], normalize: bool
) -> None:
    """On matrices in fp64 as on factors in fp32, whose few sums are rounded."""
    if flavor == "lorakit" and len(strengths) == 1:
        pytest.skip("one LoRA alone stays itself; see the test of it")
    changes = factors()[: len(strengths)]
    x = matrices(changes)
    density = 0.4 if flavor == "mergekit" else None
    scope = "tensor" if name == "ties" and flavor == "paper" else None
    method = Method(name=name, flavor=flavor, normalize=normalize, density=density, scope=scope)
    wanted = expected(method, x, strengths)
    same(found(method, given(x, strengths)), wanted, FP64)
    same(found(method, given(changes, strengths)), wanted, FP32)


@pytest.mark.parametrize(("name", "flavor"), [f for f in FLAVORED if MENU[f[0]].votes])
def test_votes_by_number(name: str, flavor: str) -> None:
    """Of four LoRAs two may be for + and two for −: the flavors differ in who wins then."""
    strengths = (0.8, -0.5, 1.2, 0.4)
    x = matrices(factors(ranks=(4, 6, 3, 5)))
    density = 0.6 if MENU[name].random else 0.8
    method = Method(
        name=name,
        flavor=flavor,
        votes="frequency",
        density=density,
        scope="tensor" if name == "ties" and flavor == "paper" else None,
    )
    same(found(method, given(x, strengths)), expected(method, x, strengths), FP64)


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("name", [n for n in NAMES if "scope" in MENU[n].defaults])
def test_trimming_by_tensor_or_by_row(name: str, scope: str) -> None:
    changes = factors()
    method = Method(name=name, scope=scope, density=0.5)
    wanted = expected(method, matrices(changes))
    same(found(method, given(matrices(changes))), wanted, FP64)
    same(found(method, given(changes)), wanted, FP32)


@pytest.mark.parametrize("flavor", ["lorakit", "mergekit"])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.05])
def test_sce(density: float, flavor: str) -> None:
    changes = factors()
    x = matrices(changes)
    wanted = twins.sce(strong(x), density, flavor)
    method = Method(name="sce", density=density, flavor=flavor)
    same(found(method, given(x)), wanted, FP64)
    same(found(method, given(changes)), wanted, FP32)


def test_sce_of_mergekit_weighs_faint_loras_alike() -> None:
    x = [matrix * 1e-5 for matrix in matrices(factors())]
    method = Method(name="sce", flavor="mergekit")
    same(found(method, given(x)), twins.sce(strong(x), 1.0, "mergekit"), FP64)
    ours = found(Method(name="sce"), given(x))
    close(ours * 1e5, found(Method(name="sce"), given(matrices(factors()))), FP64)


def test_where_signs_cancel_exactly() -> None:
    """x and −x at one strength: nobody wins, +, or the sign that most other elements have."""
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]], dtype=torch.float64)
    other = torch.tensor([[-1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    deltas = given([x, other], (1.0, 1.0))
    for flavor, wanted in (
        ("lorakit", [0.0, 0.0, 3.0, 4.0]),
        ("mergekit", [1.0, 2.0, 3.0, 4.0]),
        ("peft", [1.0, 2.0, 3.0, 4.0]),
        ("paper", [1.0, 2.0, 3.0, 4.0]),
    ):
        method = Method(name="ties", density=1.0, flavor=flavor)
        assert found(method, deltas).tolist() == [wanted], flavor
    negative = given([-x, -other], (1.0, 1.0))
    method = Method(name="ties", density=1.0, flavor="paper")
    assert found(method, negative).tolist() == [[-1.0, -2.0, -3.0, -4.0]]
    odd = given([x, other], (0.3, 0.3))
    assert found(Method(name="ties", density=1.0, flavor="mergekit"), odd)[0, 0] > 0


@each_method
def test_one_lora_alone_is_itself(name: str) -> None:
    (change, *_) = factors()
    whole = dense(change).double()
    assert torch.equal(found(Method(name=name), given([change], (1.0,))), whole)
    close(found(Method(name=name), given([change], (-0.3,))), -0.3 * whole, FP32)


@each_method
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_one_lora_are_its_mean_or_its_sum(name: str, copies: int) -> None:
    (change, *_) = factors()
    many = [
        Delta(change=change, strength=1.0, owner="a" if n == 0 else f"a#{n + 1}")
        for n in range(copies)
    ]
    times = 1 if MENU[name].votes else copies
    same(found(Method(name=name), many), times * dense(change).double(), FP32)


@each_method
def test_the_order_changes_rounding_alone(name: str) -> None:
    deltas = given(matrices(factors()))
    wanted = found(Method(name=name), deltas)
    close(found(Method(name=name), deltas[::-1]), wanted, FP64)


@each_method
def test_negating_all_strengths_negates_exactly(name: str) -> None:
    changes = factors()
    negated = found(Method(name=name), given(changes, [-s for s in STRENGTHS]))
    assert torch.equal(negated, -found(Method(name=name), given(changes)))


@each_method
def test_strengths_scale_the_result(name: str) -> None:
    changes = factors()
    for factor in (2.0, 1e-6, 37.0):
        scaled = found(Method(name=name), given(changes, [factor * s for s in STRENGTHS]))
        close(scaled, factor * found(Method(name=name), given(changes)), FP32)


@each_method
@pytest.mark.parametrize("gauge", [4.0, 10.0])
def test_how_a_lora_is_factored_changes_nothing(name: str, gauge: float) -> None:
    """By a power of two not a bit; else what flips at a threshold is an element or two."""
    changes = factors()
    turned = [Factors(up=c.up * gauge, down=c.down / gauge) for c in changes]
    wanted, answer = (
        found(Method(name=name), given(changes)),
        found(Method(name=name), given(turned)),
    )
    if gauge == 4.0:
        assert torch.equal(answer, wanted)
    off = (answer - wanted).abs() > FP32 * wanted.abs().max()
    assert int(off.sum()) <= 2
    doubled = [Factors(up=c.up.double(), down=c.down.double()) for c in changes]
    again = [Factors(up=c.up * gauge, down=c.down / gauge) for c in doubled]
    exact = found(Method(name=name), given(matrices(doubled)))
    close(found(Method(name=name), given(matrices(again))), exact, 1e-11)


@each_method
@pytest.mark.parametrize("shape", [(1, 1), (30, 1), (1, 30), (2, 2)])
def test_small_matrices_and_zeros(name: str, shape: tuple[int, int]) -> None:
    for flavor in MENU[name].flavors:
        method = Method(name=name, flavor=flavor)
        for x in (torch.randn(shape), torch.zeros(shape)):
            deltas = given([x, 0.5 * torch.ones(shape)], (1.0, -0.5))
            answer = found(method, deltas)
            assert answer.shape == shape and bool(answer.isfinite().all())
            zeros = found(method, given([torch.zeros(shape)] * 2, (1.0, -0.5)))
            assert not zeros.any()


@pytest.mark.parametrize("flavor", ["lorakit", "mergekit"])
def test_a_draw_may_leave_nothing(flavor: str) -> None:
    tiny = [torch.full((1, 1), 1e-3), torch.full((1, 2), -1e-3)[:, :1]]
    for seed in range(20):
        method = Method(name="dare-linear", density=0.2, seed=seed, flavor=flavor)
        assert bool(found(method, given(tiny, (1.0, 1.0))).isfinite().all())


@each_method
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_tiles_of_any_size_give_the_same(
    name: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = "scope" in MENU[name].defaults
    method = Method(name=name, scope=scope if taken else None, density=0.5)
    x = matrices(factors())
    wanted = found(method, given(x))
    monkeypatch.setattr(tiles, "BLOCK", 100)
    monkeypatch.setattr(tiles, "COLUMNS", 7)
    answer = found(method, given(x))
    assert torch.equal(answer == 0, wanted == 0)
    close(answer, wanted, FP64)


@each_method
def test_matrices_stay_matrices_and_factors_are_never_made_whole(name: str) -> None:
    changes = factors()
    merged = partial(
        elementwise, method=Method(name=name).filled(into_lora=False), module=MODULE, cuts={}
    )
    x = matrices(changes)
    assert isinstance(merged(given(x)), Tensor)
    # The inputs are as they were.
    assert all(torch.equal(a, b) for a, b in zip(x, matrices(changes), strict=True))
    mixed = merged(given([changes[0], x[1], changes[2]]))
    assert isinstance(mixed, Tiled)
    # Two of the three are products in fp32, whatever comes after.
    close(dense(mixed).double(), found(Method(name=name), given(x)), FP32)
    half = given([m.to(torch.bfloat16) for m in x])
    assert dense(merged(half)).dtype == torch.float32


@pytest.mark.parametrize("name", ["dare-linear", "della"])
def test_dropping_is_unbiased_and_as_noisy_as_the_law_says(name: str) -> None:
    """E‖error‖² = Σ (1 − p) / p · x², over elements with the chance p of each."""
    x = matrices(factors())
    total = torch.stack(strong(x)).sum(0)
    rounds, density = 400, 0.4
    errors = torch.stack(
        [
            found(Method(name=name, density=density, seed=seed), given(x)) - total
            for seed in range(rounds)
        ]
    )
    law = torch.zeros(SHAPE, dtype=torch.float64)
    epsilon = MENU[name].defaults.get("epsilon")
    for matrix in strong(x):
        _, chance = twins.drop(matrix, torch.zeros(matrix.numel()), density, epsilon)  # type: ignore[arg-type]
        law += matrix**2 * (1 - chance) / chance
    # 1,080 sums of 400 draws: the mean of their squared deviations is 1, give or take 5 %.
    off = (errors.mean(0) / (law / rounds).sqrt()).square()
    assert abs(float(off.mean()) - 1) < 4 * math.sqrt(2 / off.numel())
    assert float(off.max()) < 25
    assert float(errors.square().sum((1, 2)).mean()) == pytest.approx(float(law.sum()), rel=0.03)


def test_the_mask_is_a_matter_of_seed_owner_and_module() -> None:
    x, *_ = matrices(factors())
    method = Method(name="dare-linear", density=0.5)

    def kept(method: Method, owner: str, module: str) -> Tensor:
        zero = Delta(change=torch.zeros_like(x), strength=1.0, owner="zero")
        return found(method, [Delta(change=x, strength=1.0, owner=owner), zero], module) != 0

    first = kept(method, "a", "m")
    assert torch.equal(first, kept(method, "a", "m"))
    for other in (
        kept(Method(name="dare-linear", density=0.5, seed=1), "a", "m"),
        kept(method, "b", "m"),
        kept(method, "a", "n"),
        kept(Method(name="dare-ties", density=0.5), "a", "m"),
    ):
        # Half of 1,080 places differ, give or take 16.
        assert 440 < int((first != other).sum()) < 640


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "della", "density": 0.9}, "give an epsilon of at most 0.1"),
        ({"name": "della-ties", "density": 0.1}, "give an epsilon of at most 0.1"),
        ({"name": "della", "epsilon": 0.6}, "give an epsilon of at most 0.5"),
        ({"name": "breadcrumbs", "scope": "model"}, "use scope tensor or row"),
        ({"name": "ties", "scope": "model", "space": "core"}, "full space only"),
    ],
)
def test_what_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        Method(**options)  # type: ignore[arg-type]


def test_a_chance_may_be_one() -> None:
    x = matrices(factors())
    method = Method(name="della", density=0.85, epsilon=0.15)
    same(found(method, given(x)), expected(method, x), FP64)
    Method(name="della", density=1.0)
