"""What docs/coming-from says of other tools: computed by their formulas, found on the page."""

import math
from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.linalg.factored import Factors
from lorakit.linalg.ranks import RankRule, choose_rank, ranks_for_size
from lorakit.names.blocks import block_of, weights_of
from lorakit.names.sdxl import SDXL
from tests.helpers import dense, ran, tensors_of
from tests.reference import best_rank, relative_error
from tests.twins_peers import (
    Lora,
    clamped,
    dare,
    dare_node,
    delta,
    kohya_concat,
    kohya_plain,
    supermerger_plain,
    total,
    unrelated,
)

FOLDER = Path(__file__).parents[2] / "docs" / "coming-from"
EXACT = 1e-9
SEVENTEEN = (
    *("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)


def stands(page: str, *texts: str) -> None:
    """Check that a page says this, wherever its lines break."""
    text = " ".join((FOLDER / f"{page}.md").read_text(encoding="utf-8").split())
    for wanted in texts:
        assert wanted in text


def per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"


def share_of(found: Tensor, lora: Lora) -> float:
    """Return how much of a LoRA is in a result, on average over its elements."""
    change = delta(lora)
    return float((found * change).sum() / change.square().sum())


def ours(loras: list[Lora], strengths: tuple[float, ...]) -> Tensor:
    """Merge with lorakit, in fp32."""
    files = [
        lorakit.load_lora(
            {
                "lora_unet_layer.lora_up.weight": up.float(),
                "lora_unet_layer.lora_down.weight": down.float(),
                "lora_unet_layer.alpha": torch.tensor(alpha),
            }
        )
        for up, down, alpha in loras
    ]
    merged, _ = lorakit.merge(list(zip(files, strengths, strict=True)))
    (change,) = dense(merged).values()
    return change


@pytest.mark.parametrize("ranks", [(8, 8), (8, 4)])
@pytest.mark.parametrize("strengths", [(1, 1), (0.8, 0.6), (0.5, -0.5), (1, -1)])
def test_our_sum_is_what_is_meant(ranks: tuple[int, ...], strengths: tuple[float, ...]) -> None:
    loras = unrelated(*ranks)
    assert relative_error(ours(loras, strengths), total(loras, strengths)) < 2e-6


def test_kohya_squares_a_ratio_and_adds_cross_terms() -> None:
    a, b = unrelated(8, 8)
    assert share_of(kohya_plain([a], [0.5]), a) == pytest.approx(0.25, abs=EXACT)
    assert share_of(kohya_plain([a], [0.7]), a) == pytest.approx(0.49, abs=EXACT)
    off = {
        ratios: per_cent(relative_error(kohya_plain([a, b], ratios), total([a, b], ratios)))
        for ratios in ((1, 1), (0.8, 0.6), (1, -1))
    }
    stands("kohya", "| 0.25 of it |", "its 0.7 is our 0.49")
    stands(
        "kohya", f"| the sum, {off[1, 1]} off |", f"| the sum, {off[0.8, 0.6]} off | both of it |"
    )
    stands("index", f"| kohya `merge_lora.py` | 0.25 | {off[1, 1]} | no | {off[1, -1]} off |")


def test_kohya_concat_halves() -> None:
    a, b = unrelated(8, 8)
    whole = total([a, b], (1, 1))
    assert relative_error(kohya_concat([a, b], (1, 1)), 0.5 * whole) < EXACT
    assert relative_error(kohya_concat([a, b], (1, -1)), 0.5 * total([a, b], (1, -1))) < EXACT
    assert relative_error(kohya_concat([a, b], (0.5, 0.5)), 0.125 * whole) < EXACT
    assert relative_error(kohya_concat([a], [0.5]), 0.25 * delta(a)) < EXACT
    stands("kohya", "exactly half of the sum", "an eighth of the sum's two LoRAs each")
    stands("kohya", "The first gives half of the difference.", "ours works at 0.5")
    stands("index", "0.125 with a second one of its rank, 0.25 alone")


def test_kohya_concat_of_two_ranks_weighs_them_otherwise() -> None:
    a, b = unrelated(8, 4)
    expected = 2 / 3 * delta(a) - 1 / 3 * delta(b)
    assert relative_error(kohya_concat([a, b], (1, -1)), expected) < EXACT
    stands("kohya", "| 0.67 of the first, −0.33 of the second |")


def test_a_block_weight_in_both_factors_is_squared_and_loses_its_sign() -> None:
    (a,) = unrelated(8)
    up, down, alpha = a
    found = [share_of(alpha / len(down) * (w * up) @ (w * down), a) for w in (0.5, -1.0)]
    assert found == pytest.approx([0.25, 1.0])
    stands("kohya", "acts as 0.25, and −1 as 1")


def falling(peak: float, size: int = 640) -> Tensor:
    """Return a change whose σ fall as i^-0.7, its largest element `peak`."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(start)
    change = u * torch.arange(1, size + 1, dtype=torch.float64) ** -0.7 @ v
    return change * (peak / float(change.abs().max()))


def test_clamping_at_a_quantile_loses_what_it_clamps() -> None:
    said = []
    for peak in (1e-3, 0.1):
        change = falling(peak)
        best, found = best_rank(change, 32), clamped(change, 32)
        said.append(
            (relative_error(found, best), 1 - float((found * best).sum() / best.norm() ** 2))
        )
        assert relative_error(clamped(change, 32, 1.0), best) < EXACT, "no clamp, no loss"
    (small, weaker), (large, weakest) = said
    stands("kohya", f"the result is {per_cent(small)} off the best one")
    stands("kohya", f"0.001, {per_cent(large)} off where it is 0.1")
    stands("kohya", f"and {per_cent(weaker)} to {per_cent(weakest)} too weak")


def test_clamping_loses_of_an_exact_sum_too() -> None:
    loras = unrelated(8, 8)
    whole = total(loras, (1, 1))
    off = per_cent(relative_error(clamped(whole, 16), whole))
    assert relative_error(ours(loras, (1, 1)), whole) < 2e-6
    stands("kohya", f"| the sum, {off} off | the factors are clamped")
    stands("supermerger", f"| {off} off at the full rank |")


def test_text_encoders_that_changed_little_are_kept(tmp_path: Path) -> None:
    layout = synthetic.single_file("sd1", factor=32)
    base = synthetic.write_checkpoint(tmp_path / "base.safetensors", layout)
    tuned = synthetic.write_tuned(tmp_path / "tuned.safetensors", layout)
    before, after = tensors_of(base), tensors_of(tuned)
    texts = [key for key in before if key.startswith("cond_stage_model")]
    largest = max(float((after[key].float() - before[key].float()).abs().max()) for key in texts)
    assert 0 < largest < 0.1
    ran("extract", base, tuned, "--rank", 4, "-o", tmp_path / "out.safetensors")
    found = lorakit.load_lora(tmp_path / "out.safetensors")
    assert sum(module.startswith("text_encoder.") for module in found.adapters) == 72
    stands("kohya", "`--min_diff` 0.01 | kept if they changed at all |")
    stands("supermerger", "changed by more than 0.1")


def test_kohyas_dynamic_ranks_are_one_too_many_and_ours_are_not() -> None:
    s = torch.tensor([8.0, 4.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05])
    two = {
        "sv_ratio": RankRule(sv_ratio=4),
        "sv_sum": RankRule(sv_sum=float(s[:2].sum() / s.sum()) - 1e-6),
        "energy": RankRule(energy=float(s[:2].square().sum() / s.square().sum()) - 1e-6),
    }
    kohya = int((s > s[0] / 4).sum()) + 1
    assert {name: choose_rank(s, rule) for name, rule in two.items()} == dict.fromkeys(two, 2)
    assert kohya == 3
    stands("kohya", "of eight where two are wanted, three")


def test_kohyas_sv_fro_is_the_root_of_the_energy() -> None:
    s = torch.rand(64, generator=torch.Generator().manual_seed(1)).sort(descending=True).values
    norms = s.square().cumsum(0).sqrt() / s.norm()
    fewest = int((norms < 0.95).sum()) + 1
    assert choose_rank(s, RankRule(energy=0.95**2)) == fewest
    assert choose_rank(s, RankRule(energy=0.95)) != fewest
    stands("kohya", "--energy 0.9025", "| `--energy X²`")


def test_supermerger_squares_and_loses_the_sign() -> None:
    a, b = unrelated(8, 8)
    shares = [
        share_of(supermerger_plain([a], [ratio], same=same), a)
        for same in (False, True)
        for ratio in (0.5, -0.5)
    ]
    assert shares == pytest.approx([0.25, 0.25, 0.5, -0.5])
    off = {
        (ratios, same): per_cent(
            relative_error(supermerger_plain([a, b], ratios, same=same), total([a, b], ratios))
        )
        for ratios in ((0.7, 0.4), (1, 1), (1, -1))
        for same in (False, True)
    }
    plain, rooted = off[(0.7, 0.4), False], off[(0.7, 0.4), True]
    stands("supermerger", f'the sum, {plain} off; with "same to Strength" {rooted} off')
    stands("supermerger", "| +0.25 of it: the sign is lost |", f"{math.sqrt(0.5):.2f} of it")
    stands("index", f"| {off[(1, 1), False]} | no | {off[(1, -1), False]} off |")


def test_presets_of_17_values_switch_most_of_sdxl_off() -> None:
    lost = [block for block in SDXL.blocks if block not in SEVENTEEN]
    assert lost == ["IN00", "IN03", "IN06", "OUT00", "OUT01", "OUT02"]
    layers = [
        module for module in SDXL.modules if module.startswith("unet.") and ".attentions." in module
    ]
    layers = [module for module in layers if not SDXL.modules[module].norm]
    places = {module.partition(".transformer_blocks.")[0::2] for module in layers}
    blocks = {(at, rest.partition(".")[0], block_of(at, SDXL)) for at, rest in places if rest}
    off = sum(block in lost for *_, block in blocks)
    gone = sum(block_of(module, SDXL) in lost for module in layers)
    stands("supermerger", f"{off} of the {len(blocks)} transformer blocks")
    stands("supermerger", f"{gone} of the {len(layers)} layers")
    assert set(weights_of("ALL", SDXL, {}).values()) == {1.0}


def test_a_weight_of_zero_on_the_factors_of_a_dora_is_not_off() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    magnitude = 1.1 * weight.norm(dim=1, keepdim=True)
    left = magnitude * weight / weight.norm(dim=1, keepdim=True) - weight
    assert float(left.norm() / weight.norm()) == pytest.approx(0.1)
    stands("supermerger", "`up` alone: 0 is not off")


def test_chop_blocks_cubes_a_weight() -> None:
    (a,) = unrelated(8)
    up, down, alpha = a
    chopped = (0.5 * alpha) / len(down) * (0.5 * up) @ (0.5 * down)
    assert share_of(chopped, a) == pytest.approx(0.125)
    stands("resize_lora", "0.5 acts as 0.125", f"{0.5 ** (1 / 3):.2f} for 0.5")


def test_means_over_factors_depend_on_how_a_lora_is_written() -> None:
    (a,) = unrelated(8)
    up, down, _ = a
    up = up * float(down.abs().mean() / up.abs().mean())
    assert relative_error((100 * up) @ (down / 100), up @ down) < EXACT

    def mean(first: Tensor, second: Tensor) -> float:
        return float(first.abs().mean() + second.abs().mean()) / 2

    ratio = mean(100 * up, down / 100) / mean(up, down)
    stands("resize_lora", f"mean |x| is {ratio:.0f} times as large")


def test_a_size_spent_by_the_byte_keeps_more_than_one_spent_by_the_score() -> None:
    layers = {
        module.path: module.shape[0] + math.prod(module.shape[1:])
        for module in synthetic.modules("sdxl", factor=1)
        if module.component == "unet" and module.kind != "conv"
    }
    s = torch.arange(1, 33, dtype=torch.float64) ** -0.5
    price = {path: 2 * sides for path, sides in layers.items()}
    budget = 16 * sum(price.values())
    none, free = dict.fromkeys(layers, 0), dict.fromkeys(layers)
    ranks = ranks_for_size(dict.fromkeys(layers, s), price, budget, overhead=none, caps=free)
    spent = sum(price[path] * rank for path, rank in ranks.items())
    kept = sum(float(s[:rank].square().sum()) for rank in ranks.values())
    whole = len(layers) * float(s.square().sum())
    # By score alone, equal layers get equal ranks.
    theirs = float(s[:16].square().sum() / s.square().sum())
    assert 0.999 * budget < spent <= budget
    stands("resize_lora", f"SDXL's {len(layers)} layers at rank 32, {per_cent(kept / whole)}")
    stands("resize_lora", f"where they keep {per_cent(theirs)}")


def test_the_dare_node_scales_by_p_over_1_minus_p() -> None:
    generator = torch.Generator().manual_seed(1)
    ones: Lora = (torch.ones(1000, 1000), torch.eye(1000), 1.0)
    for p in (0.13, 0.5, 0.9):
        kept = torch.rand(1000, 1000, generator=generator) < p
        assert float((ones[0] * kept / (1 - p)).mean()) == pytest.approx(p / (1 - p), rel=0.01)
    said = [f"{p / (1 - p):.{digits}f}" for p, digits in ((0.13, 3), (0.5, 1), (0.9, 1))]
    stands("comfyui", f"{said[0]} of each factor at its default p = 0.13, {said[1]} of it at 0.5")
    stands("comfyui", f"{said[2]} of it at 0.9")


def test_dropping_entries_of_factors_is_not_dropping_entries_of_the_change() -> None:
    (a,) = unrelated(8)
    change, generator = delta(a), torch.Generator().manual_seed(1)

    def cosine(found: Tensor) -> float:
        return float((found * change).sum() / found.norm() / change.norm())

    node = sum(cosine(dare_node(a, 0.13, generator)) for _ in range(40)) / 40
    real = cosine(dare(change, 0.87, generator))
    stands(
        "comfyui",
        f"its cosine with the LoRA is {node:.2f}; DARE on ΔW that drops 0.13 keeps {real:.2f}",
    )


@pytest.mark.parametrize("alpha", [None, torch.tensor(1.0)])
def test_an_alpha_of_1_is_not_one_that_is_missing(alpha: Tensor | None) -> None:
    tensors = {
        "lora_unet_layer.lora_up.weight": torch.randn(32, 16),
        "lora_unet_layer.lora_down.weight": torch.randn(16, 32),
    }
    if alpha is not None:
        tensors["lora_unet_layer.alpha"] = alpha
    (adapter,) = lorakit.load_lora(tensors).adapters.values()
    change = adapter.change()
    assert isinstance(change, Factors)
    plain = tensors["lora_unet_layer.lora_up.weight"] @ tensors["lora_unet_layer.lora_down.weight"]
    scale = 1.0 if alpha is None else 1 / 16
    torch.testing.assert_close(
        change.up @ change.down, plain.double() * scale, rtol=1e-5, atol=1e-5
    )
    stands("comfyui", "runs at 1 / 16 of its strength")
