"""What docs/coming-from says of PEFT and mergekit: computed by them, found on the page."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method
from lorakit.methods.table import combine
from tests.oracle.test_coming_from import per_cent, stands
from tests.oracle.test_methods_peers_elementwise import mergekit, sparsify
from tests.reference import relative_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
FP32 = 1e-5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(96, 80, bias=False)


class Adapted:
    """A layer with two PEFT adapters, `a` and `b`, that have nothing in common."""

    def __init__(self, *ranks: int, gauge: float = 1.0, rslora: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.count, names = 0, ("a", "b")
        self.model: Any = Layer()
        for number, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            config = peft.LoraConfig(
                r=rank, lora_alpha=rank, target_modules=["proj"], use_rslora=rslora
            )
            if number == 0:
                self.model = peft.get_peft_model(self.model, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
            scale = gauge if number == 0 else 1.0
            down = torch.randn(rank, 96, generator=generator) / scale
            self.layer.lora_A[name].weight.data = down
            self.layer.lora_B[name].weight.data = torch.randn(80, rank, generator=generator) * scale

    @property
    def layer(self) -> Any:
        return self.model.base_model.model.proj

    def delta(self, name: str) -> Tensor:
        found: Tensor = self.layer.get_delta_weight(name).double().detach()
        return found

    def total(self, weights: Sequence[float]) -> Tensor:
        return weights[0] * self.delta("a") + weights[1] * self.delta("b")

    def merged(self, weights: Sequence[float], kind: str, **more: Any) -> Tensor:
        self.count += 1
        name = f"merged{self.count}"
        self.model.add_weighted_adapter(
            ["a", "b"], list(weights), name, combination_type=kind, **more
        )
        return self.delta(name)


def test_peft_linear_adds_cross_terms_and_cat_and_svd_do_not() -> None:
    adapted = Adapted(8, 8)
    off = {}
    for weights in ((1.0, 1.0), (0.7, 0.3), (1.0, -1.0)):
        meant = adapted.total(weights)
        off[weights] = per_cent(relative_error(adapted.merged(weights, "linear"), meant))
        assert relative_error(adapted.merged(weights, "cat"), meant) < FP32
        assert relative_error(adapted.merged(weights, "svd", svd_rank=16), meant) < FP32
    stands("peft", f"unrelated adapters at 1 and 1 | the sum, {off[1.0, 1.0]} off |")
    stands("peft", f"`linear` at 0.7 and 0.3 | {off[0.7, 0.3]} off |")
    stands("peft", f"`linear` at 1 and −1 | {off[1.0, -1.0]} off |")
    stands("index", f"| PEFT `linear` | 0.5 | {off[1.0, 1.0]} | no | {off[1.0, -1.0]} off |")


def test_peft_linear_depends_on_how_an_adapter_is_written() -> None:
    plain, gauged = Adapted(8, 8), Adapted(8, 8, gauge=10)
    assert relative_error(gauged.delta("a"), plain.delta("a")) < FP32
    away = relative_error(gauged.merged((1, 1), "linear"), plain.merged((1, 1), "linear"))
    stands("peft", f"another result, {per_cent(away)} away")
    same = relative_error(gauged.merged((1, 1), "cat"), plain.merged((1, 1), "cat"))
    assert same < FP32


def test_peft_trims_factors_where_its_svd_kinds_trim_the_change() -> None:
    adapted = Adapted(8, 8)
    away = [
        per_cent(
            relative_error(
                adapted.merged((1, 1), kind, density=0.5),
                adapted.merged((1, 1), f"{kind}_svd", density=0.5, svd_rank=80),
            )
        )
        for kind in ("ties", "magnitude_prune")
    ]
    stands("peft", f"at density 0.5 | {away[0]} and {away[1]} away from the same method on ΔW |")


def test_peft_makes_rslora_too_large() -> None:
    adapted = Adapted(8, 8, rslora=True)
    meant = adapted.total((1, 1))
    assert relative_error(adapted.merged((1, 1), "cat"), 4 * meant) < FP32
    stands("peft", "two rsLoRA adapters of rank 8 at 1 and 1 | four times the sum |")


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties"])
def test_peft_refuses_other_ranks_for_factors(kind: str) -> None:
    adapted = Adapted(8, 4)
    with pytest.raises(ValueError, match="same r value"):
        adapted.merged((1, 1), kind, density=0.5)
    assert relative_error(adapted.merged((1, 1), "cat"), adapted.total((1, 1))) < FP32
    stands(
        "peft", "adapters of ranks 8 and 4 with any type but `cat` and the `_svd` ones | refused"
    )


def change(seed: int, rows: int = 64, columns: int = 80) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        up=torch.randn(rows, 6, generator=generator),
        down=torch.randn(6, columns, generator=generator),
    )


def theirs(weights: Sequence[float], **more: Any) -> Tensor:
    """Merge by mergekit's ties."""
    tensors = [dense(change(number)) for number in range(len(weights))]
    return mergekit("ties", tensors, weights, **more)


def ours(weights: Sequence[float]) -> Tensor:
    deltas = [
        Delta(change=change(number), strength=weight, owner=str(number))
        for number, weight in enumerate(weights)
    ]
    method = Method(name="ties", density=1.0).filled(into_lora=False)
    return dense(combine(deltas, method, module="layer"))


def test_mergekit_ties_does_not_know_half_from_whole_and_ours_does() -> None:
    half, whole = theirs((0.5, 0.5)), theirs((1.0, 1.0))
    assert relative_error(half, whole) < FP32
    assert relative_error(ours((0.5, 0.5)), 0.5 * ours((1.0, 1.0))) < FP32
    bare = [theirs((weight, weight), normalize=False) for weight in (0.5, 1.0)]
    assert relative_error(bare[0], 0.5 * bare[1]) < FP32
    stands("mergekit", "at weights 0.5 and 0.5 | what it gives at 1 and 1 | half of that |")


def test_mergekit_ties_of_one_at_minus_one_is_plus_one() -> None:
    meant = -dense(change(0))
    assert relative_error(theirs((-1.0,)), -meant) < FP32
    assert relative_error(ours((-1.0,)), meant) < FP32
    stands("mergekit", "`ties`, one model at −1 | +1 times its change | −1 times it |")


def factor(x: Tensor) -> float:
    """Return what mergekit's DARE multiplies what it keeps by, at density 0.2."""
    kept = sparsify.sparsify(
        x,
        density=0.2,
        method=sparsify.SparsificationMethod.random,
        rescale_norm=sparsify.RescaleNorm.l1,
    )
    return float((kept[kept != 0] / x[kept != 0]).mean())


def test_mergekit_rescales_small_layers_by_chance() -> None:
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(16, 8, 3, generator=generator)
    # Student's t with two degrees of freedom: heavy tails, as changes have.
    small = gaussian[..., 0] / (gaussian[..., 1:].square().sum(-1) / 2).sqrt()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = [factor(small) for _ in range(300)]
        large = factor(torch.randn(1000, 1000))
    assert min(found) < 3 and max(found) > 10
    stands("mergekit", "a layer of 16 x 8 | what is left is multiplied by 3 or less in some draws")
    stands("mergekit", "and by 10 or more in others | by 5 |")
    stands("mergekit", f"a million weights | by {large:.1f} | by 5 |")
