"""What a merge says of itself: the noise of random dropping in numbers, what model-stock takes."""

import math
import re

import pytest
import torch
from torch import Tensor

from lorakit import apply
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, load_lora
from lorakit.methods.method import Method
from lorakit.operations.merge import merge
from lorakit.tensorfile.source import DictSource
from tests.helpers import weighted
from tests.properties.test_method_invariants import FULL, A, B, of

NUMBERS = re.compile(r"noise of (about|at most) ([\d.]+) times its norm(, of which ([\d.]+) are)?")


def told(notes: tuple[str, ...]) -> tuple[float, float | None]:
    (note,) = notes
    found = NUMBERS.search(note)
    assert found and note.endswith("--method linear has none."), note
    return float(found[2]), float(found[4]) if found[4] else None


def off(lora: LoraFile, expected: dict[str, Tensor]) -> float:
    found = of(lora)
    parts = [(found[m] - expected[m]).square().sum() / 1 for m in expected]
    return math.sqrt(float(sum(parts)) / float(sum(x.square().sum() for x in expected.values())))


SUM = weighted([(of(A), 0.8), (of(B), 0.5)])
STACK = [(A, 0.8), (B, 0.5)]


@pytest.mark.parametrize("space", ["core", "full"])
@pytest.mark.parametrize("options", [{}, {"lambda_": 3.0}, {"normalize": True}])
def test_dare_says_how_much_noise_it_adds_and_how_much_is_left(
    options: dict[str, float], space: str
) -> None:
    law = math.sqrt(sum(float(x.square().sum()) * s * s for f, s in STACK for x in of(f).values()))
    law *= math.sqrt(0.7 / 0.3) / math.sqrt(sum(float(x.square().sum()) for x in SUM.values()))
    method = Method(name="dare-linear", density=0.3, space=space, **options)  # type: ignore[arg-type]
    merged, report = merge(STACK, method=method, rule=RankRule(rank=8))
    noise, left = told(report.notes)
    assert noise == pytest.approx(law, abs=0.006)
    factor = options.get("lambda_", 1 / 1.3 if options else 1.0)
    assert left == pytest.approx(off(merged, weighted([(SUM, factor)])), abs=0.006)
    if space == "full":
        assert left < 0.9 * noise, "cut to a rank, some of the noise goes with the rest"


def test_della_says_a_bound_that_its_noise_keeps() -> None:
    off_by = []
    for seed in range(8):
        method = Method(name="della", density=0.4, epsilon=0.3, space="full", seed=seed)
        _, report = merge(STACK, method=method, rule=FULL)
        noise, left = told(report.notes)
        assert left is not None
        off_by.append(left)
    assert "at most" in report.notes[0]
    plain = math.sqrt(math.log(0.7 / 0.1) / 0.6 - 1) / math.sqrt(0.6 / 0.4)
    dare, _ = told(merge(STACK, method=Method(name="dare-linear", density=0.4))[1].notes)
    assert noise == pytest.approx(dare * plain, abs=0.02)
    assert 0.5 * noise < sum(off_by) / len(off_by) < noise


def test_into_a_model_the_noise_is_told_before_it_is_made() -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    only = [
        (
            load_lora(
                {
                    f"lora_unet_{layer.replace('.', '_')}.{key}": value
                    for key, value in (
                        ("lora_up.weight", torch.randn(40, 4)),
                        ("lora_down.weight", torch.randn(4, 40)),
                    )
                }
            ),
            1.0,
        )
        for _ in range(2)
    ]
    model = DictSource({f"unet/{layer}.weight": torch.zeros(40, 40)})
    _, report = apply(model, only, method=Method(name="dare-linear"))
    noise, left = told(report.notes)
    assert noise == pytest.approx(1.0, abs=0.2) and left is None


def test_one_lora_alone_has_no_noise() -> None:
    for name in ("dare-linear", "della", "model-stock"):
        assert merge([(A, 0.5), (A, 0.2)], method=Method(name=name))[1].notes == ()


def test_model_stock_warns_where_it_takes_most_away() -> None:
    (note,) = merge(STACK, method=Method(name="model-stock"))[1].notes
    assert "multiplies the change by 0.0" in note and "nearly orthogonal" in note
    near = load_lora(
        {
            f"{name}.{key}": tensor
            for name, seed in (("lora_unet_mid_block_attentions_0_proj_in", 1),)
            for key, tensor in (
                ("lora_up.weight", torch.ones(20, 1)),
                ("lora_down.weight", torch.ones(1, 20) + 0.1 * torch.randn(1, 20)),
            )
        }
    )
    other = load_lora(
        {
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(20, 1),
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 20),
        }
    )
    alike = [(near, 1.0), (other, 1.0)]
    assert merge(alike, method=Method(name="model-stock"))[1].notes == ()
