"""Every flavor against the tool it is named after, on the same matrices and the same masks."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.dropping import LEVELS, dropped, dropped_by_rank, mask_name
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.methods.table import combine
from tests import reference

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
FP32 = 1e-5
"""Both sum a few terms in fp32."""
MODULE = "unet.some.layer"
SHAPE = (48, 80)
STRENGTHS = [(1.0, 1.0, 1.0), (0.7, 0.7, 0.7), (1.0, 0.5, 0.25), (1.0, -1.0, 0.5)]
MERGEKIT = {
    "ties": "ties",
    "dare-linear": "dare_linear",
    "dare-ties": "dare_ties",
    "della": "della_linear",
    "della-ties": "della",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs-ties": "breadcrumbs_ties",
    "sce": "sce",
    "linear": "task_arithmetic",
}


def factors(count: int = 3, kind: torch.dtype = torch.float32) -> list[Factors]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for number in range(count):
        up = torch.randn(SHAPE[0], 6, generator=generator, dtype=torch.float64)
        down = torch.randn(6, SHAPE[1], generator=generator, dtype=torch.float64)
        made.append(Factors(up=(up * (1 + number)).to(kind), down=down.to(kind)))
    return made


def deltas(strengths: Sequence[float], kind: torch.dtype = torch.float32) -> list[Delta]:
    return [
        Delta(change=change, strength=s, owner=f"lora{number}")
        for number, (change, s) in enumerate(
            zip(factors(len(strengths), kind), strengths, strict=True)
        )
    ]


def ours(method: Method, given: Sequence[Delta]) -> Tensor:
    """Merge from factors, a tile at a time, as it is done into a checkpoint."""
    filled = method.filled(into_lora=False)
    return dense(combine(given, filled, module=MODULE)).double()


def masks(method: Method, given: Sequence[Delta]) -> Iterator[Tensor]:
    """Yield the masks that lorakit draws, in the order of the LoRAs."""
    filled = method.filled(into_lora=False)
    place = (slice(0, SHAPE[0]), slice(0, SHAPE[1]))
    for delta in given:
        name = mask_name(filled.name, filled.seed or 0, delta.owner, MODULE)
        tile = dense(delta.change)
        density = filled.density or 1.0
        if filled.epsilon is None:
            yield dropped(tile, place, name=name, density=density)[0]
        else:
            yield dropped_by_rank(tile, place, name=name, density=density, epsilon=filled.epsilon)[
                0
            ]


def with_our_masks(
    monkeypatch: pytest.MonkeyPatch, method: Method, given: Sequence[Delta]
) -> list[Tensor]:
    """Let a peer's draws give our masks; return the chances that it asked for."""
    drawn, asked = masks(method, given), []

    def fake(chances: Tensor, *more: Any, **other: Any) -> Tensor:
        asked.append(chances)
        return next(drawn).to(chances.dtype)

    if MENU[method.name].random:
        monkeypatch.setattr(torch, "bernoulli", fake)
    return asked


def mergekit(name: str, given: Sequence[Delta], **parameters: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import TensorGroup
    ids = [delta.owner for delta in given]
    tensors = [dense(delta.change) for delta in given]
    group = TensorGroup.from_tensors(
        [torch.zeros_like(tensors[0]), *tensors], ids=["base", *ids], base_index=0
    )
    each = {key: dict.fromkeys(ids, value) for key, value in parameters.items() if key in PER_LORA}
    if name not in ("sce", "karcher", "model_stock"):
        each["weight"] = {delta.owner: delta.strength for delta in given}
    whole = {key: value for key, value in parameters.items() if key not in PER_LORA}
    found = registry.get(name)([group], parameters=each | whole)[0]
    return found.double()  # type: ignore[no-any-return]


PER_LORA = ("density", "gamma", "epsilon")
SET = {
    "ties": {"density": 0.3},
    "dare-linear": {"density": 0.4},
    "dare-ties": {"density": 0.4},
    "della": {"density": 0.4, "epsilon": 0.2},
    "della-ties": {"density": 0.4, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "breadcrumbs-ties": {"density": 0.6, "gamma": 0.05},
    "linear": {},
}


@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("name", SET)
def test_mergekit(name: str, strengths: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(name=name, flavor="mergekit", **SET[name])  # type: ignore[arg-type]
    given = deltas(strengths)
    found = ours(method, given)
    with_our_masks(monkeypatch, method, given)
    more = {} if name == "linear" else SET[name]
    expected = mergekit(MERGEKIT[name], given, **more)

    def check(answer: Tensor) -> None:
        torch.testing.assert_close(answer, expected, rtol=FP32, atol=FP32 * float(expected.max()))

    reference.negative_control(check, found)


@pytest.mark.parametrize("name", ["dare-linear", "della"])
def test_the_chances_are_those_that_mergekit_asks_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method(name=name, flavor="mergekit", **SET[name])  # type: ignore[arg-type]
    given = deltas((1.0, 1.0, 1.0))
    asked = with_our_masks(monkeypatch, method, given)
    mergekit(MERGEKIT[name], given, **SET[name])
    assert len(asked) == 3
    for chances, delta in zip(asked, given, strict=True):
        if name == "dare-linear":
            assert float((chances - 0.4).abs().max()) < 1e-6
            continue
        place = (slice(0, SHAPE[0]), slice(0, SHAPE[1]))
        _, factor = dropped_by_rank(dense(delta.change), place, name="x", density=0.4, epsilon=0.2)
        # Chances are numbers of 65536ths.
        assert float((1 / factor - chances).abs().max()) < 1 / LEVELS


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_mergekit_sce(density: float) -> None:
    given = deltas((1.0, 1.0, 1.0))
    found = ours(Method(name="sce", flavor="mergekit", density=density), given)
    expected = mergekit("sce", given, select_topk=density)
    torch.testing.assert_close(found, expected, rtol=FP32, atol=FP32 * float(expected.max()))


@pytest.mark.parametrize("name", ["karcher", "model-stock"])
def test_mergekit_of_angles(name: str) -> None:
    given = deltas((1.0, 1.0, 1.0), torch.float64)
    found = ours(Method(name=name, flavor="mergekit"), given)
    expected = mergekit(name.replace("-", "_"), given)
    if name == "karcher":
        # mergekit's counts the base among its inputs: a ΔW of zero has no direction there either.
        expected = expected * 4 / 3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.3, 0.9)])
def test_mergekit_slerp(strengths: tuple[float, float]) -> None:
    given = deltas(strengths, torch.float64)
    found = ours(Method(name="slerp", flavor="mergekit"), given)
    expected = mergekit("nuslerp", given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.max()))


PEFT = {"ties": "ties", "dare-linear": "dare_linear", "dare-ties": "dare_ties",
        "magnitude": "magnitude_prune"}  # fmt: skip


@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("votes", ["total", "frequency"])
@pytest.mark.parametrize("name", PEFT)
def test_peft(
    name: str, votes: str, strengths: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import merge_utils

    given = deltas(strengths)
    elected = {"votes": "mass" if votes == "total" else votes} if MENU[name].votes else {}
    method = Method(name=name, flavor="peft", density=0.3, **elected)  # type: ignore[arg-type]
    found = ours(method, given)
    with_our_masks(monkeypatch, method, given)
    tensors = [dense(delta.change) for delta in given]
    more = {"majority_sign_method": votes} if MENU[name].votes else {}
    weights = torch.tensor(strengths)
    expected = getattr(merge_utils, PEFT[name])(tensors, weights, density=0.3, **more).double()

    def check(answer: Tensor) -> None:
        torch.testing.assert_close(answer, expected, rtol=FP32, atol=FP32 * float(expected.max()))

    reference.negative_control(check, found)


def test_mergekit_turns_one_adapter_at_minus_one_into_itself_and_we_do_not() -> None:
    """Its division by Σ strength, a sum that is negative here, takes the sign away."""
    given = deltas((-1.0,))
    delta = dense(given[0].change).double()
    assert reference.relative_error(mergekit("ties", given, density=1.0), delta) < FP32
    found = ours(Method(name="ties"), given)
    assert reference.relative_error(found, -delta) < FP32


def test_peft_always_elects_plus_when_two_disagree_and_we_do_not() -> None:
    """A vote by frequency of two LoRAs that disagree is a tie: PEFT takes the positive one."""
    from peft.utils import merge_utils

    given = deltas((1.0, 1.0))
    one, other = (dense(delta.change) for delta in given)
    fight = (one * other < 0).double()
    theirs = merge_utils.ties(
        [one, other], torch.ones(2), density=1.0, majority_sign_method="frequency"
    )
    assert bool((theirs[fight > 0] > 0).all())
    found = ours(Method(name="ties", density=1.0, votes="frequency"), given)
    larger = torch.where(one.abs() > other.abs(), one, other).double()
    assert bool((found[fight > 0].sign() == larger[fight > 0].sign()).all())


ADAPTERS = {"a": (3, 5.0, 0.8), "b": (5, 2.0, -0.5), "c": (2, 7.0, 1.3)}
"""Rank, alpha, strength."""


@pytest.mark.parametrize(
    ("theirs", "name", "options", "more"),
    [
        ("svd", "linear", {}, {}),
        ("ties_svd", "ties", {"density": 0.3}, {}),
        ("ties_svd", "ties", {"density": 0.3, "votes": "frequency"},
         {"majority_sign_method": "frequency"}),
        ("magnitude_prune_svd", "magnitude", {"density": 0.4}, {}),
    ],
)  # fmt: skip
def test_adapters_that_peft_itself_merges(
    theirs: str, name: str, options: dict[str, Any], more: dict[str, str]
) -> None:
    """Its combinations on ΔW at full rank, from adapters of unequal ranks and alphas."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    configs = {
        key: LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])  # type: ignore[arg-type]
        for key, (rank, alpha, _) in ADAPTERS.items()
    }
    model: Any = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(31, 23)),  # type: ignore[arg-type]
        configs["a"],
        adapter_name="a",
    )
    for key in "bc":
        model.add_adapter(key, configs[key])
    layer, given = model.base_model.model[0], []
    for key, (rank, alpha, strength) in ADAPTERS.items():
        up, down = layer.lora_B[key].weight, layer.lora_A[key].weight
        torch.nn.init.normal_(up)
        change = Factors(up=up.detach() * alpha / rank, down=down.detach())
        given.append(Delta(change=change, strength=strength, owner=key))
    density = {"density": options["density"]} if options else {}
    strengths = [delta.strength for delta in given]
    model.base_model.add_weighted_adapter(
        list(ADAPTERS), strengths, "merged", theirs, svd_rank=23, **density, **more
    )
    expected = layer.get_delta_weight("merged").detach().double()
    found = ours(Method(name=name, flavor="peft", **options), given)

    def check(answer: Tensor) -> None:
        torch.testing.assert_close(answer, expected, rtol=FP32, atol=FP32 * float(expected.max()))

    reference.negative_control(check, found)
