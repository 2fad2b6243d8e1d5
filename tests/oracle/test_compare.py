"""compare against dense float64 arithmetic, and what it says in plain words."""

from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.errors import AdapterError, NumericsError, SpecError, UnmatchedError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, load_lora
from lorakit.operations.compare import compare
from lorakit.operations.compare_models import compare_models
from lorakit.operations.comparison import Compared
from lorakit.operations.strength import Strength
from lorakit.tensorfile.source import DictSource, open_source
from tests.conftest import MakeCheckpoint

PLACES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (40, 30),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (40, 72),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (48, 32),
}


def tensors(seed: int, rank: int = 4, *, only: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in list(PLACES.items())[:only]:
        found[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, generator=generator)
        found[f"{name}.lora_down.weight"] = torch.randn(rank, shape[1], generator=generator)
    return found


def lora(seed: int, rank: int = 4, *, only: int = 3) -> LoraFile:
    return load_lora(tensors(seed, rank, only=only))


def named(file: LoraFile, name: str) -> LoraFile:
    from dataclasses import replace

    return replace(file, name=name)


A, B = named(lora(1), "a.safetensors"), named(lora(2, 6), "b.safetensors")


def flat(file: LoraFile, strength: float = 1.0) -> dict[str, Tensor]:
    return {
        module: strength * (change.up @ change.down)
        for module, adapter in file.adapters.items()
        if not isinstance(change := adapter.change(), Tensor)
    }


def whole(deltas: dict[str, Tensor]) -> Tensor:
    return torch.cat([deltas[module].flatten() for module in sorted(deltas)])


def test_norms_angles_and_distances_are_those_of_the_dense_changes() -> None:
    found = compare([(A, 0.7), (B, -1.3)]).total
    one, other = whole(flat(A, 0.7)), whole(flat(B, -1.3))
    assert found.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-10)
    cosine = float(one @ other / one.norm() / other.norm())
    assert found.cosines[0][1] == pytest.approx(cosine, abs=1e-10)
    assert found.distances[0][1] == pytest.approx(float((one - other).norm() / one.norm()))
    assert found.distances[1][0] == pytest.approx(float((one - other).norm() / other.norm()))


def test_the_blocks_add_up_to_the_whole() -> None:
    found = compare([(A, 1.0), (B, 1.0)])
    assert [row.block for row in found.blocks] == ["BASE", "IN01", "MID"]
    assert sum(row.layers for row in found.blocks) == found.total.layers == 3
    square = sum(row.norms[0] ** 2 for row in found.blocks)
    assert square == pytest.approx(found.total.norms[0] ** 2)


def test_overlap_is_that_of_the_singular_directions() -> None:
    found = compare([(A, 1.0), (B, 1.0)]).blocks[1]
    module = next(m for m in flat(A) if "attn1" in m)
    parts = [torch.linalg.svd(flat(file)[module]) for file in (A, B)]
    left = (parts[0].U[:, :4].T @ parts[1].U[:, :6]).square().sum()
    right = (parts[0].Vh[:4] @ parts[1].Vh[:6].T).square().sum()
    assert found.overlap[0][1] == pytest.approx(float(left + right) / 8, rel=1e-6)
    assert found.chance[0][1] == pytest.approx((6 / 40 + 6 / 30) / 2)
    assert found.overlap[0][0] == pytest.approx(1.0)


def test_unrelated_directions_overlap_as_chance_says() -> None:
    shape, rounds = (200, 160), 40
    name = next(iter(PLACES))
    found = []
    for seed in range(rounds):
        generator = torch.Generator().manual_seed(seed)
        files = [
            load_lora(
                {
                    f"{name}.lora_up.weight": torch.randn(shape[0], 8, generator=generator),
                    f"{name}.lora_down.weight": torch.randn(8, shape[1], generator=generator),
                }
            )
            for _ in range(2)
        ]
        found.append(compare([(file, 1.0) for file in files]).total)
    mean = sum(row.overlap[0][1] for row in found) / rounds
    assert mean == pytest.approx(found[0].chance[0][1], rel=0.05)


def test_conflict_is_the_share_of_signs_that_disagree() -> None:
    found = compare([(A, 0.5), (B, -2.0)])
    for row, module in zip(found.blocks, sorted(flat(A)), strict=True):
        del module
        assert 0.4 < row.conflict[0][1] < 0.6
    module = next(m for m in flat(A) if "attn1" in m)
    one, other = flat(A, 0.5)[module], flat(B, -2.0)[module]
    assert found.blocks[1].conflict[0][1] == pytest.approx(
        float((one.sign() != other.sign()).double().mean())
    )
    assert compare([(A, 1.0), (A, -1.0)]).total.conflict[0][1] == 1.0


def test_the_energy_that_a_rank_keeps_of_the_sum() -> None:
    found = compare([(A, 1.0), (B, 1.0)], rule=RankRule(rank=3)).total
    kept = total = 0.0
    for module, delta in flat(A).items():
        values = torch.linalg.svdvals(delta + flat(B)[module]).square()
        kept, total = kept + float(values[:3].sum()), total + float(values.sum())
    assert found.energy == pytest.approx(kept / total, rel=1e-6)
    assert compare([(A, 1.0), (B, 1.0)]).total.energy is None


def test_layers_that_one_lacks_count_as_zero_and_are_counted() -> None:
    small = named(lora(3, only=1), "small.safetensors")
    found = compare([(A, 1.0), (small, 1.0)])
    assert found.only_in == {"a": 2}
    base = found.blocks[0]
    assert base.norms[1] == 0.0 and base.cosines[0][1] == 0.0
    assert base.distances[1][0] == float("inf") and base.as_dict()["distances"][1][0] is None


def test_strengths_of_blocks_count() -> None:
    found = compare([(A, Strength(unet=1.0, te=0.0)), (B, 1.0)])
    assert found.blocks[0].norms[0] == 0.0 and found.blocks[1].norms[0] > 0


def test_factoring_and_dialect_change_nothing(tmp_path: Path) -> None:
    again = {key: tensor * (8.0 if "up" in key else 0.125) for key, tensor in tensors(1).items()}
    lorakit.save_lora(tmp_path / "adapter", A, output=lorakit.Output(dialect="peft", dtype="F32"))
    for twin in (load_lora(again), load_lora(tmp_path / "adapter")):
        found = compare([(A, 1.0), (twin, 1.0)]).total
        assert found.cosines[0][1] == pytest.approx(1.0, abs=1e-12)
        assert found.distances[0][1] < 1e-6
        assert found.overlap[0][1] == pytest.approx(1.0)


def merged(parts: list[tuple[LoraFile, float]], name: str) -> LoraFile:
    return named(lorakit.merge(parts)[0], name)


C = named(lora(7), "c.safetensors")


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ([(A, 1.0), (B, 1.0)], "little to do with each other"),
        (
            [(A, 1.0), (named(A, "a2"), 0.5)],
            "a and a2 are nearly the same (cosine 1.000; a2 is 0.50 times as strong as a)",
        ),
        ([(A, 1.0), (named(A, "a2"), -0.5)], "a and a2 pull against each other (cosine -1.00)"),
        (
            [(A, 1.0), (B, 1.0), (merged([(A, 0.7), (B, 0.3)], "mix.safetensors"), 1.0)],
            "mix is 0.70·a + 0.30·b to within 0.01%: a merge of these.",
        ),
        ([(A, 1.0), (merged([(A, 1.0), (B, 0.7)], "half"), 1.0)], "a and half are much alike"),
    ],
)
def test_the_advice(stack: list[tuple[LoraFile, float]], words: str) -> None:
    assert words in compare(stack).advice


def test_shared_directions_are_told() -> None:
    """Two trainings that move the same directions differently: orthogonal, and yet together."""
    one, other = tensors(1), tensors(1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    for name in PLACES:
        up = torch.linalg.qr(one[f"{name}.lora_up.weight"])[0]
        down = torch.linalg.qr(one[f"{name}.lora_down.weight"].T)[0].T
        swap = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        one[f"{name}.lora_up.weight"], one[f"{name}.lora_down.weight"] = up, down
        other[f"{name}.lora_up.weight"], other[f"{name}.lora_down.weight"] = up @ swap, down
    del turn
    words = compare([(load_lora(one), 1.0), (load_lora(other), 1.0)]).advice
    assert "use the same directions (100% of them" in words and "--method tsv" in words


def model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    paths = {
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (40, 30),
        "unet/mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight": (40, 72),
        "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight": (48, 32),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in paths.items()}


def test_two_models_are_compared_by_their_weights() -> None:
    first, second = model(1), {key: t + 0.1 * t.roll(1) for key, t in model(1).items()}
    found = compare_models([DictSource(first), DictSource(second)])
    one, other = (torch.cat([t.flatten() for t in m.values()]).double() for m in (first, second))
    assert found.kind == "models"
    assert found.total.cosines[0][1] == pytest.approx(
        float(one @ other / one.norm() / other.norm())
    )
    assert found.total.distances[0][1] == pytest.approx(
        float((one - other).norm() / one.norm()), rel=1e-6
    )
    assert "extract takes the difference out" in found.advice


def test_more_models_are_compared_by_their_changes_and_a_merge_is_told() -> None:
    base = model(1)
    tunes = [{k: base[k] + 0.01 * t for k, t in model(seed).items()} for seed in (2, 3)]
    mix = {k: base[k] + 0.6 * (tunes[0][k] - base[k]) + 0.4 * (tunes[1][k] - base[k]) for k in base}
    names = ("base", "one", "two", "mix")
    sources = [DictSource(m, name=n) for m, n in zip((base, *tunes, mix), names, strict=True)]
    found = compare_models(sources)
    assert found.kind == "changes" and found.names == ("one", "two", "mix")
    assert "mix is 0.60·one + 0.40·two to within" in found.advice


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(SpecError, match="needs two LoRAs or more, found 1"):
        compare([(A, 1.0)])
    with pytest.raises(SpecError, match="needs two models or more, found 1"):
        compare_models([DictSource(model(1))])
    other = {"unet/mid_block.resnets.0.conv1.weight": torch.randn(4, 4, 3, 3)}
    with pytest.raises(UnmatchedError, match="no layer in common"):
        compare_models([DictSource(model(1)), DictSource(other)])
    wide = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2.lora_up.weight": torch.ones(
            44, 2
        ),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2.lora_down.weight": (
            torch.ones(2, 72)
        ),
    }
    with pytest.raises(AdapterError, match="for different models"):
        compare([(A, 1.0), (load_lora(wide), 1.0)])


def test_a_row_of_zeros_has_no_angles() -> None:
    nothing, four = ((0.0, 0.0), (0.0, 4.0)), ((0.0, 4.0), (4.0, 0.0))
    row = Compared(block="X", layers=1, gram=nothing, apart=four)
    assert row.norms == (0.0, 2.0) and row.cosines[0][1] == 0.0
    assert row.distances == ((0.0, float("inf")), (1.0, 0.0))


# What an earlier version said wrongly


def test_all_strengths_of_a_layer_at_zero_leave_it_out_and_all_of_all_are_refused() -> None:
    some = Strength(unet=1.0, te=0.0)
    found = compare([(A, some), (B, some)])
    assert [row.block for row in found.blocks] == ["IN01", "MID"]
    with pytest.raises(UnmatchedError, match="Every strength is zero"):
        compare([(A, 0.0), (B, 0.0)])


def test_a_lora_at_strength_zero_is_said_to_change_nothing() -> None:
    assert "b changes nothing at this strength" in compare([(A, 1.0), (B, 0.0)]).advice


def test_a_scaled_model_is_not_called_equal() -> None:
    doubled = {key: 2 * tensor for key, tensor in model(1).items()}
    found = compare_models([DictSource(model(1)), DictSource(doubled)])
    assert found.total.cosines[0][1] == pytest.approx(1.0) and "equal" not in found.advice
    assert found.total.distances[0] == pytest.approx((0.0, 1.0))


def test_equal_models_are_called_equal_and_norms_that_differ_are_counted() -> None:
    norm = "unet/mid_block.resnets.0.norm1.weight"
    one, other = ({**model(1), norm: torch.full((8,), size)} for size in (1.0, 1.5))
    same = compare_models([DictSource(one), DictSource(dict(one))])
    assert same.advice.endswith("are equal in every weight.") and not same.notes
    near = compare_models([DictSource(one), DictSource(other)])
    assert "differ in 1 other tensors" in near.advice


def test_the_merge_is_named_whatever_the_order() -> None:
    mix = merged([(A, 0.7), (B, 0.3)], "mix.safetensors")
    for stack in ([A, B, mix], [A, mix, B], [mix, B, A]):
        told = compare([(file, 1.0) for file in stack]).advice
        assert told.startswith("mix is 0.") and told.endswith("a merge of these.")


def test_a_copy_is_not_called_a_merge() -> None:
    told = compare([(A, 1.0), (B, 1.0), (named(A, "again.safetensors"), 1.0)]).advice
    assert "a and again are nearly the same" in told


def test_of_models_a_second_copy_is_not_told_to_lower_its_strength(
    sd15: Path, sd15_tuned: Path, make_checkpoint: MakeCheckpoint
) -> None:
    again = make_checkpoint("sd1", leftovers=True, tuning=synthetic.Tuning(rank=4, noise=0.0011))
    told = compare_models([open_source(path) for path in (sd15, sd15_tuned, again)]).advice
    assert "changed the first model in nearly the same way" in told and "strength" not in told


def test_convolutions_have_a_rank_of_their_own() -> None:
    place = "lora_unet_mid_block_resnets_0_conv1"
    generator = torch.Generator().manual_seed(5)
    files = [
        load_lora(
            {
                f"{place}.lora_up.weight": torch.randn(20, 4, 1, 1, generator=generator),
                f"{place}.lora_down.weight": torch.randn(4, 10, 3, 3, generator=generator),
            }
        )
        for _ in range(2)
    ]
    deltas = [next(iter(flat(file).values())) for file in files]
    values = torch.linalg.svdvals(deltas[0] + deltas[1]).square()
    found = compare([(file, 1.0) for file in files], rule=RankRule(rank=5, conv_rank=2)).total
    assert found.energy == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-6)


def test_the_distance_of_all_but_equal_changes_is_no_rounding() -> None:
    """The squares cancel: 1e-7 of a norm is 1e-14 of its square."""
    near = {key: t * (1 + 1e-7) if "up" in key else t for key, t in tensors(1).items()}
    double = [load_lora({k: t.double() for k, t in part.items()}) for part in (tensors(1), near)]
    dense_ones = [
        torch.cat(
            [
                (
                    part[f"{n}.lora_up.weight"].double() @ part[f"{n}.lora_down.weight"].double()
                ).flatten()
                for n in PLACES
            ]
        )
        for part in (tensors(1), near)
    ]
    expected = float((dense_ones[0] - dense_ones[1]).norm() / dense_ones[0].norm())
    found = compare([(file, 1.0) for file in double]).total
    assert found.distances[0][1] == pytest.approx(expected, rel=1e-2)
    assert compare([(A, 1.0), (A, 1.0)]).total.distances[0][1] == 0.0


def test_a_change_without_factors_is_compared_as_it_is() -> None:
    """A LoHa of full rank: cosines and distances are exact, not those of its leading directions."""
    place, generator = next(iter(PLACES)), torch.Generator().manual_seed(9)
    rows, columns = PLACES[place]
    parts = {
        f"{place}.hada_{side}_{half}": torch.randn(
            *((rows, 6) if half == "a" else (6, columns)), generator=generator
        )
        for side in ("w1", "w2")
        for half in ("a", "b")
    }
    one = (parts[f"{place}.hada_w1_a"].double() @ parts[f"{place}.hada_w1_b"].double()) * (
        parts[f"{place}.hada_w2_a"].double() @ parts[f"{place}.hada_w2_b"].double()
    )
    other = next(d for m, d in flat(A).items() if "attn1" in m)
    found = compare([(load_lora(parts), 1.0), (load_lora(tensors(1, only=1)), 1.0)]).total
    cosine = float((one * other).sum() / one.norm() / other.norm())
    assert found.cosines[0][1] == pytest.approx(cosine, abs=1e-6)


# What one is made of


MANY = {f"lora_unet_up_blocks_{b}_attentions_{a}_proj_in": (40, 30) for b in (1, 2) for a in (0, 1)}


def many(seed: int, rank: int = 6, *, decay: float = 0.6) -> LoraFile:
    """Return a LoRA of four blocks, its spectrum falling."""
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(rank)
    found = {}
    for name, (rows, columns) in MANY.items():
        found[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * scale
        found[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator)
    return named(load_lora(found), f"s{seed}.safetensors")


ONE, TWO = many(11), many(12)
BLOCKS = ("OUT03", "OUT04", "OUT06", "OUT07")


def test_a_merge_with_weights_by_block_is_told_by_block() -> None:
    weights = {"OUT03": 0.0, "OUT04": 0.5, "OUT06": 1.0, "OUT07": 1.0}
    mix = merged([(ONE, Strength(blocks=weights)), (TWO, 0.3)], "mix")
    for stack in ([ONE, TWO, mix], [mix, ONE, TWO]):
        found = compare([(file, 1.0) for file in stack])
        mixture = found.mixture
        assert mixture is not None and not mixture.even and mixture.residual < 1e-5
        assert mixture.name == "mix" and found.cut is None
        for block, weight in weights.items():
            assert mixture.blocks[block].shares == pytest.approx(
                {"s11": weight, "s12": 0.3}, abs=1e-6
            )
        assert "0.50·s11 + 0.30·s12 in OUT04" in found.advice
    assert compare([(file, 1.0) for file in (ONE, TWO, many(13))]).mixture is None


def test_what_a_merge_is_made_of_is_least_squares_on_the_changes() -> None:
    """With noise on top, so that something is left."""
    noise = many(14)
    mix = merged([(ONE, 0.7), (TWO, 0.4), (noise, 0.03)], "mix")
    found = compare([(file, 1.0) for file in (ONE, TWO, mix)]).mixture
    sides = torch.stack([whole(flat(file)) for file in (ONE, TWO)], dim=1).double()
    target = whole(flat(mix)).double()
    exact = torch.linalg.lstsq(sides, target.unsqueeze(1)).solution.flatten()
    assert found is not None and list(found.shares.values()) == pytest.approx(exact.tolist())
    left = float((target - sides @ exact).norm() / target.norm())
    assert found.residual == pytest.approx(left, rel=1e-6) and 0.01 < left < 0.05


def test_the_merge_is_the_one_that_holds_the_directions_of_all() -> None:
    """Each of the three is a sum of the others; before = after − change is no merge."""
    change = merged([(TWO, 1.0), (ONE, -1.0)], "change")
    for stack in ([ONE, TWO, change], [change, TWO, ONE], [TWO, change, ONE]):
        told = compare([(file, 1.0) for file in stack]).advice
        assert told.startswith("change is 1.00·s12 - 1.00·s11 to within")


def test_the_most_that_a_rank_can_hold_is_of_the_singular_values() -> None:
    small = many(15, rank=2)
    found = compare([(ONE, 2.0), (small, 1.0)]).total
    squares = {m: torch.linalg.svdvals(d).double() ** 2 for m, d in flat(ONE, 2.0).items()}
    exact = sum(float(values[:2].sum()) for values in squares.values())
    assert found.best[0][1] == pytest.approx(exact, rel=1e-6)
    assert found.best[0][0] == pytest.approx(found.gram[0][0])
    assert found.best[1][0] == pytest.approx(found.gram[1][1])


def cut_blocks(file: LoraFile, weights: dict[str, float], name: str) -> LoraFile:
    return named(lorakit.cut_blocks(file, blocks=weights)[0], name)


def test_what_a_cut_by_blocks_left() -> None:
    weights = {"OUT03": 0.0, "OUT04": 1.0, "OUT06": 0.5, "OUT07": 1.0}
    cut = cut_blocks(ONE, weights, "cut")
    for stack in ([ONE, cut], [cut, ONE], [TWO, cut, ONE]):
        found = compare([(file, 1.0) for file in stack])
        assert found.cut is not None and (found.cut.name, found.cut.source) == ("cut", "s11")
        assert found.cut.strengths == pytest.approx(weights, abs=1e-6)
        squares = {row.block: row.norms[stack.index(ONE)] ** 2 for row in found.blocks}
        kept = 1 - squares["OUT03"] / sum(squares.values())
        assert found.cut.kept == pytest.approx(kept) and found.cut.residual is not None
        assert "cut is s11 cut by blocks" in found.advice and "nothing in OUT03" in found.advice


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_what_a_cut_to_a_lower_rank_left(strength: float) -> None:
    small, report = lorakit.resize(ONE, rule=RankRule(rank=2))
    small = named(lorakit.merge([(small, strength)])[0], "small")
    for stack in ([ONE, small], [small, TWO, ONE]):
        found = compare([(file, 1.0) for file in stack])
        assert found.cut is not None and (found.cut.name, found.cut.source) == ("small", "s11")
        assert found.cut.residual is None and found.cut.kept == pytest.approx(report.energy)
        assert list(found.cut.strengths.values()) == pytest.approx([strength] * 4, rel=1e-5)
        at = "" if strength == 1.0 else " at 0.40"
        assert f"small is s11{at} cut to a lower rank: " in found.advice
    both = cut_blocks(small, dict.fromkeys(BLOCKS[1:], 1.0) | {"OUT03": 0.0}, "both")
    told = compare([(ONE, 1.0), (both, 1.0)]).advice
    assert f"both is s11{at} cut to a lower rank, with nothing in OUT03" in told


def test_what_was_not_cut_is_not_called_so() -> None:
    """Another LoRA, one trained on, the same directions otherwise, one strength, the opposite."""
    on = named(lorakit.merge([(ONE, 1.0), (TWO, 0.4)])[0], "on")
    turned = {
        k: v * (torch.tensor([1.0, 0.2] * 3) if ".lora_up" in k else 1.0)
        for k, v in {
            f"{name}.lora_{side}.weight": getattr(ONE.adapters[module], side)
            for name, module in zip(MANY, sorted(ONE.adapters), strict=True)
            for side in ("up", "down")
        }.items()
    }
    for other in (TWO, on, named(load_lora(turned), "turned"), named(ONE, "again")):
        assert compare([(ONE, 1.0), (other, 1.0)]).cut is None, other.name
    assert compare([(ONE, 1.0), (ONE, 0.5)]).cut is None
    assert compare([(ONE, 1.0), (ONE, -0.5)]).cut is None


def tuned(seed: int, size: float = 0.03) -> dict[str, Tensor]:
    return {k: t + size * model(seed)[k] for k, t in model(1).items()}


def stored(parts: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["ABM", "MAB", "0ABM", "AMB0"])
def test_a_weighted_sum_of_checkpoints_is_told_in_any_order(dtype: torch.dtype, order: str) -> None:
    """Also where rounding is much of what they differ by, and where no base is named."""
    a, b = stored(tuned(2), dtype), stored(tuned(3), dtype)
    mix = {k: (0.6 * a[k].float() + 0.4 * b[k].float()).to(dtype) for k in a}
    models = {"0": stored(model(1), dtype), "A": a, "B": b, "M": mix}
    found = compare_models([DictSource(models[name], name=name) for name in order])
    assert found.base == order[0] and found.mixture is not None
    assert found.mixture.name == "M" and found.mixture.even
    assert found.mixture.shares == pytest.approx({"A": 0.6, "B": 0.4}, abs=0.02)
    assert "M is 0.60·A + 0.40·B to within" in found.advice
    assert ("which its rounding explains" in found.advice) == (dtype != torch.float32)
    if dtype != torch.float32:
        assert found.mixture.residual == pytest.approx(found.mixture.rounding, rel=0.25)


def test_what_is_added_to_a_model_and_weights_by_block_are_told() -> None:
    base, a, b = model(1), tuned(2), tuned(3)
    added = {k: a[k] + 0.7 * (b[k] - base[k]) for k in base}
    names, models = ("base", "a", "b", "mix"), (base, a, b)
    found = compare_models(
        [DictSource(m, name=n) for m, n in zip((*models, added), names, strict=True)]
    )
    assert found.mixture is not None
    assert found.mixture.shares == pytest.approx({"base": -0.7, "a": 1.0, "b": 0.7}, abs=1e-4)
    assert "mix is 1.00·a + 0.70·b - 0.70·base" in found.advice
    mbw = {k: (1 - w) * a[k] + w * b[k] for k, w in zip(base, (0.2, 0.9, 0.5), strict=True)}
    found = compare_models([DictSource(m, name=n) for m, n in zip((a, b, mbw), "abm", strict=True)])
    assert found.mixture is not None and not found.mixture.even
    told = {block: part.shares["b"] for block, part in found.mixture.blocks.items()}
    assert told == pytest.approx({"IN01": 0.2, "MID": 0.9, "BASE": 0.5}, abs=1e-4)
    assert "weights by block" in found.advice and "0.80·a + 0.20·b in IN01" in found.advice


def test_models_that_are_no_merge_are_not_called_so() -> None:
    sources = [DictSource(m) for m in (model(1), tuned(2), tuned(3), tuned(4))]
    assert compare_models(sources).mixture is None
    assert compare_models(sources[1:]).mixture is None


def test_a_model_that_holds_nan_is_named() -> None:
    """It made nan of every number, and least squares fail."""
    broken = {key: tensor.clone() for key, tensor in tuned(2).items()}
    next(iter(broken.values()))[0, 0] = torch.nan
    for sources in ([model(1), broken], [model(1), tuned(3), broken]):
        named_ones = [DictSource(m, name=str(place)) for place, m in enumerate(sources)]
        with pytest.raises(NumericsError, match=r"\d: unet\..* holds NaN or infinity"):
            compare_models(named_ones)
