"""Leading directions by products in fp32: as good as the best, or refused."""

import math

import pytest
import torch
from torch import Tensor

import lorakit
from lorakit.linalg import single
from lorakit.linalg.dense import TruncatedSvd
from lorakit.linalg.ranks import RankRule
from lorakit.operations import spectra
from tests import reference
from tests.helpers import dense

SHAPES = [(96, 160, 24), (160, 96, 24), (24, 40, 24), (5000, 64, 16), (64, 5000, 16)]
EXCESS = 1e-6
"""What the error may be above the best one, relative: the square of δ = 6e-4, with room."""


def factors(m: int, n: int, r: int, *, decay: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors that fp16 holds: `up` with falling directions as training makes them."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(r, r, generator=g))[0]
    size = torch.exp(-decay * torch.arange(r))
    up = torch.randn(m, r, generator=g) * size @ turn
    return up.half().float(), torch.randn(r, n, generator=g).half().float()


def excess(found: Tensor, exact: Tensor, rank: int) -> float:
    """Return by how much the error is above that of the best matrix of a rank, relative."""
    best = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    return float((found - exact).norm() / best) - 1


def product(found: TruncatedSvd) -> Tensor:
    return (found.u.double() * found.s) @ found.v.double().T


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("rank", [1, 6])
def test_what_is_made_of_the_directions_is_the_best_of_that_rank(
    m: int, n: int, r: int, rank: int
) -> None:
    up, down = factors(m, n, r)
    exact = up.double() @ down.double()
    (found,) = single.leading_together(up[None], down[None], rank)
    assert found is not None

    def check(answer: Tensor) -> None:
        assert abs(excess(answer, exact, rank)) < EXCESS

    reference.negative_control(check, product(found))
    expected = torch.linalg.svdvals(exact)[:rank]
    torch.testing.assert_close(found.s, expected, rtol=1e-5, atol=0)
    assert math.isclose(found.energy_total, float(exact.square().sum()), rel_tol=1e-5)
    error = reference.relative_error(reference.best_rank(exact, rank), exact)
    assert found.residual == pytest.approx(error, rel=1e-5)
    for side in (found.u.double(), found.v.double()):
        torch.testing.assert_close(side.T @ side, torch.eye(rank).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dependence", [0.3, 0.1, 0.03])
def test_rows_that_are_just_independent_enough_do_no_harm(dependence: float) -> None:
    up, down = factors(96, 160, 24)
    down[1:] = down[:1] + dependence * down[1:]
    exact = up.double() @ down.double()
    (found,) = single.leading_together(up[None], down[None], 4)
    # 24 rows of length one at this distance have an inverse of about √24 / dependence.
    assert (found is None) == (math.sqrt(24) / dependence > 100)
    if found is not None:
        assert excess(product(found), exact, 4) < EXCESS


def test_terms_are_written_side_by_side_with_their_factors_in_one_of_the_sides() -> None:
    g = torch.Generator().manual_seed(0)
    terms = [
        single.Term(
            up=torch.randn(9, r, generator=g).half(),
            down=torch.randn(r, 7, generator=g).bfloat16(),
            factor=factor,
        )
        for r, factor in ((2, 1.0), (3, -0.3), (1, 2.0), (4, 0.7))
    ]
    sums = [terms[:2], [terms[2], terms[3]]]
    ups, downs = single.side_by_side(sums, torch.device("cpu"))
    assert (ups.shape, downs.shape, ups.dtype) == ((2, 9, 5), (2, 5, 7), torch.float32)
    for up, down, parts in zip(ups, downs, sums, strict=True):
        expected = sum(term.factor * term.up.double() @ term.down.double() for term in parts)

        def check(answer: Tensor, expected: Tensor = expected) -> None:  # type: ignore[assignment]
            assert reference.relative_error(answer, expected) < 1e-6

        reference.negative_control(check, up.double() @ down.double())


def test_what_fp32_is_not_exact_enough_for_is_refused() -> None:
    up, down = factors(96, 160, 24)
    faint = torch.cat([up[:, :1], 1e-3 * up[:, 1:]], dim=1)
    opposite = torch.cat([up[:, :12], -up[:, :12] + 1e-3 * up[:, 12:]], dim=1)
    twice = torch.cat([down[:12], down[:12]])
    refused = {
        "dependent rows": (up, twice, 4),
        "the last one wanted is faint": (faint, down, 4),
        "parts that cancel": (opposite, torch.cat([down[:12], down[:12] + 1e-3]), 4),
        "nothing is left out": (torch.cat([up[:, :4], 1e-4 * up[:, 4:]], dim=1), down, 4),
        "every direction is wanted": (up, down, 24),
        "squares overflow": (up * 1e25, down, 4),
        "squares underflow": (up, down * 1e-25, 4),
        "zero": (up * 0, down, 4),
        "fewer columns than rank": (up, down[:, :20], 4),
    }
    for why, (left, right, rank) in refused.items():
        assert single.leading_together(left[None], right[None], rank) == [None], why
    assert single.leading_together(up[None], down[None], 4) != [None]


def test_each_of_several_is_decided_by_itself() -> None:
    up, down = factors(96, 160, 24)
    ups, downs = torch.stack([up, up * 0, up]), torch.stack([down] * 3)
    first, none, last = single.leading_together(ups, downs, 4)
    assert none is None and first is not None and last is not None
    assert torch.equal(product(first), product(last))


def test_a_layer_that_is_refused_is_solved_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of `down` that are nearly the same: the Gram matrix in fp32 knows too little of them."""
    up, down = factors(96, 160, 24)
    up[:, 1::2] = -up[:, ::2] + 0.01 * up[:, 1::2]
    down[1::2] = down[::2] + 0.01 * down[1::2]
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_up.weight": up.half(), f"{key}.lora_down.weight": down.half()}
    lora = lorakit.load_lora(tensors)
    exact = next(iter(dense(lora).values())).double()
    asked: list[int] = []
    solve = spectra.decomposed_together
    monkeypatch.setattr(
        spectra, "decomposed_together", lambda *a: asked.append(len(a[0])) or solve(*a)
    )
    found = next(iter(dense(lorakit.resize(lora, rule=RankRule(rank=4))[0]).values()))
    assert asked == [1]
    assert excess(found.double(), exact, 4) < EXCESS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_factors_of_16_bits_are_multiplied_in_fp32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = factors(96, 160, 24)
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_up.weight": up.to(dtype), f"{key}.lora_down.weight": down.to(dtype)}
    lora = lorakit.load_lora(tensors)
    asked: list[int] = []
    solve = spectra.leading_together
    monkeypatch.setattr(spectra, "leading_together", lambda *a: asked.append(a[2]) or solve(*a))
    for rule in (RankRule(rank=4), RankRule(rank=4, energy=0.9), RankRule(size=4000)):
        lorakit.resize(lora, rule=rule)
    lorakit.merge([(lora, 0.5), (lora, 0.25)], rule=RankRule(rank=5))
    lorakit.merge([(lora, 0.5), (lora, 0.25)])
    assert asked == ([] if dtype == torch.float32 else [4, 5])
