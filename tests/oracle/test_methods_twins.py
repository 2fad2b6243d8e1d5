"""Every method against its formula on dense float64 matrices, and the laws of random dropping."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.linalg import tiles
from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.angular import stock_factor
from lorakit.methods.calibration import pico
from lorakit.methods.cores import cores_of
from lorakit.methods.ctm import ctm
from lorakit.methods.cuts import model_cuts
from lorakit.methods.delta import Delta
from lorakit.methods.linear import linear
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.methods.spaces import in_core, in_knots
from lorakit.methods.table import combine
from tests import reference, twins

FP64 = 1e-10
FP32 = 1e-5
MODULE = "unet.some.layer"
SHAPES = [(60, 44), (24, 90), (10, 12)]
"""Wide, tall, and one whose sides are smaller than the sum of the ranks."""
STRENGTHS = (0.8, -0.5, 1.2)


def deltas(
    shape: tuple[int, int] = (60, 44),
    strengths: tuple[float, ...] = STRENGTHS,
    *,
    ranks: tuple[int, ...] = (4, 6, 3),
    kind: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Delta]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, (strength, rank) in enumerate(zip(strengths, ranks, strict=False)):
        up = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
        down = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
        change = Factors(up=up.to(kind) * (number + 1), down=down.to(kind))
        made.append(Delta(change=change, strength=strength, owner=f"lora{number}"))
    return made


def plain(given: list[Delta]) -> list[Tensor]:
    return [dense(d.change).double() for d in given]


def signed(given: list[Delta]) -> list[Tensor]:
    return [dense(d.change).double() * d.strength for d in given]


def found(method: Method, given: list[Delta], *, rank: int | None = None) -> Tensor:
    filled = method.filled(into_lora=False)
    return dense(combine(given, filled, module=MODULE, rank=rank)).double()


def close(answer: Tensor, expected: Tensor, tolerance: float) -> None:
    def check(value: Tensor) -> None:
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=atol)

    reference.negative_control(check, answer)


@pytest.mark.parametrize("shape", SHAPES)
def test_ties(shape: tuple[int, int]) -> None:
    given = deltas(shape, kind=torch.float32)
    expected = twins.ties(plain(given), [d.strength for d in given], 0.3)
    close(found(Method(name="ties", density=0.3), given), expected, FP32)


def test_ties_of_the_paper_trims_over_the_whole_model() -> None:
    layers = [deltas((40, 30), (1.0, 1.0), seed=1), deltas((20, 50), (1.0, 1.0), seed=2)]
    cuts = model_cuts([lambda given=given: given for given in layers], 0.2)  # type: ignore[misc]
    wanted = []
    for owner in (0, 1):
        whole = torch.cat([dense(given[owner].change).flatten() for given in layers]).abs()
        wanted.append(float(whole.sort(descending=True).values[int(0.2 * len(whole)) - 1]))
        assert cuts[f"lora{owner}"] == pytest.approx(wanted[-1], rel=1e-12)
        # The products' last bits depend on how they are cut into tiles.
        wanted[-1] *= 1 - 1e-12
    filled = Method(name="ties", flavor="paper").filled(into_lora=False)
    assert filled.scope == "model" and filled.density == 0.2
    for given in layers:
        expected = twins.ties_paper(plain(given), [1.0, 1.0], wanted)
        answer = dense(combine(given, filled, module=MODULE, cuts=cuts)).double()
        close(answer, expected, FP32)


def test_breadcrumbs_of_the_paper_goes_by_rows() -> None:
    given = deltas((30, 50))
    method = Method(name="breadcrumbs", flavor="paper", density=0.7, gamma=0.1)
    expected = twins.breadcrumbs_rows(plain(given), list(STRENGTHS), 0.7, 0.1)
    close(found(method, given), expected, FP32)


@pytest.mark.parametrize("name", ["dare-linear", "della"])
def test_dropping_is_unbiased_and_its_noise_follows_the_law(name: str) -> None:
    """E‖error‖² = (1 − p) / p · Σ‖x‖² for dare; della's chances differ from element to element."""
    given = deltas((40, 60))
    whole = torch.stack(signed(given)).sum(0)
    rounds = 300
    errors = torch.stack(
        [found(Method(name=name, density=0.4, seed=seed), given) - whole for seed in range(rounds)]
    )
    spread = errors.std(dim=0) / math.sqrt(rounds)
    off = (errors.mean(dim=0) / spread.clamp(min=1e-12)).abs()
    # 2,400 normal numbers: 4.6 deviations are exceeded by one of them in a hundred runs.
    assert float(off.max()) < 5
    assert float(errors.mean(dim=0).square().mean() / spread.square().mean()) < 1.3
    if name == "dare-linear":
        law = 0.6 / 0.4 * sum(float(x.square().sum()) for x in signed(given))
        measured = float(errors.square().sum(dim=(1, 2)).mean())
        assert measured == pytest.approx(law, rel=0.03)


@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_a_density_of_one_keeps_everything(space: str) -> None:
    given = deltas()
    whole = torch.stack(signed(given)).sum(0)
    for name in ("dare-linear", "della", "magnitude"):
        answer = found(Method(name=name, density=1.0, space=space), given)
        close(answer, whole, FP32 if space == "full" else FP64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_core_space_loses_nothing(shape: tuple[int, int]) -> None:
    given = deltas(shape)
    whole = torch.stack(signed(given)).sum(0)
    for space in (in_core, in_knots):
        close(dense(space(given, linear)), whole, FP64)
    cores = cores_of([d.change for d in given])
    for core, delta in zip(cores.cores, plain(given), strict=True):
        close(dense(cores.spread(core)), delta, FP64)


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_in_core_coordinates(shape: tuple[int, int]) -> None:
    given = deltas(shape)
    u, cores, v = twins.core(plain(given))
    expected = u @ twins.ties(cores, list(STRENGTHS), 0.3) @ v.T
    close(found(Method(name="ties", density=0.3, space="core"), given), expected, FP64)


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_in_knots_coordinates(shape: tuple[int, int]) -> None:
    given = deltas(shape)
    u, blocks = twins.knots(plain(given))
    expected = u @ twins.ties(blocks, list(STRENGTHS), 0.3)
    close(found(Method(name="ties", density=0.3, space="knots"), given), expected, FP64)


def test_the_core_space_knows_weak_loras_and_dependent_ones() -> None:
    one, other, _ = deltas()
    faint = Delta(change=Factors(up=other.change.up * 1e-9, down=other.change.down), strength=1.0)  # type: ignore[union-attr]
    cores = cores_of([one.change, faint.change, one.change])
    assert cores.cores[0].shape == (10, 10), "4 directions, 6 faint ones, and no new ones"
    close(dense(cores.spread(cores.cores[1])), dense(faint.change), 1e-6)
    zero = Factors(up=torch.zeros(60, 2), down=torch.zeros(2, 44))
    nothing = [Delta(change=zero, strength=1.0, owner=str(i)) for i in range(2)]
    for space in (in_core, in_knots):
        assert not dense(space(nothing, linear)).any()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.9), (-0.4, 0.7)])
def test_slerp(weights: tuple[float, float]) -> None:
    given = deltas(strengths=weights)
    total = sum(map(abs, weights))
    x = [matrix * total / abs(s) for matrix, s in zip(signed(given), weights, strict=True)]
    close(found(Method(name="slerp"), given), twins.slerp(x, abs(weights[1]) / total), FP64)


def test_karcher_is_where_the_arcs_balance() -> None:
    given = deltas()
    answer = found(Method(name="karcher"), given)
    unit = answer / answer.norm()
    shares = [abs(s) / sum(map(abs, STRENGTHS)) for s in STRENGTHS]
    assert twins.karcher_gradient(unit, signed(given), shares) < 1e-12
    moved = unit + 1e-3 * torch.randn(unit.shape, dtype=unit.dtype)
    assert twins.karcher_gradient(moved / moved.norm(), signed(given), shares) > 1e-5
    assert float(answer.norm()) == pytest.approx(sum(float(x.norm()) for x in signed(given)))


def test_karcher_of_two_is_slerp_and_of_parallel_ones_their_sum() -> None:
    given = deltas(strengths=(0.3, 0.9))
    both = found(Method(name="karcher"), given), found(Method(name="slerp"), given)
    close(both[0], both[1], FP64)
    one = given[0].change
    parallel = [Delta(change=one, strength=s, owner=str(s)) for s in (0.5, 0.2)]
    close(found(Method(name="karcher"), parallel), 0.7 * dense(one), 1e-7)
    opposite = [Delta(change=one, strength=s, owner=str(s)) for s in (0.5, -0.2)]
    close(found(Method(name="karcher"), opposite), 0.3 * dense(one), 1e-7)


def test_model_stock_and_its_factor() -> None:
    given = deltas(strengths=(1.0, 1.0, 1.0))
    shared = deltas(ranks=(5, 5, 5), seed=5)[0].change
    joined = [
        Delta(
            change=Factors(
                up=torch.cat([d.change.up, 9 * shared.up], dim=1),  # type: ignore[union-attr]
                down=torch.cat([d.change.down, shared.down]),  # type: ignore[union-attr]
            ),
            strength=d.strength,
            owner=d.owner,
        )
        for d in given
    ]
    close(found(Method(name="model-stock"), joined), twins.model_stock(signed(joined)), FP64)
    assert stock_factor(joined) > 0.5
    many = deltas((200, 200), strengths=(1.0, 1.0, 1.0), ranks=(8, 8, 8))
    assert stock_factor(many) < 0.1, "unrelated LoRAs are nearly orthogonal"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["tsv", "iso-c", "iso-cts"])
def test_subspaces(name: str, shape: tuple[int, int]) -> None:
    given = deltas(shape)
    x = signed(given)
    expected = {
        "tsv": lambda: twins.tsv(x),
        "iso-c": lambda: twins.iso_c(x),
        "iso-cts": lambda: twins.iso_cts(x, 0.5),
    }[name]()
    more = {"density": 0.5} if name == "iso-cts" else {}
    close(found(Method(name=name, **more), given), expected, 1e-8)  # type: ignore[arg-type]


def test_tsv_cuts_each_lora_to_its_share_of_the_rank() -> None:
    given = deltas()
    answer = found(Method(name="tsv"), given, rank=6)
    close(answer, twins.tsv(signed(given), share=2), 1e-8)


def test_ctm_holds_at_least_what_the_leading_directions_hold() -> None:
    given = deltas()
    x = signed(given)
    for rank in (2, 4, 7):
        merged = ctm(given, Method(name="ctm"), rank)
        assert merged.rank == rank
        left = torch.linalg.qr(merged.up)[0]
        right = torch.linalg.qr(merged.down.T)[0]
        u, _, _ = twins.svd(torch.cat(x, dim=1), rank)
        _, _, v = twins.svd(torch.cat(x, dim=0), rank)
        assert twins.tucker_energy(x, left, right) > twins.tucker_energy(x, u, v) * (1 - 1e-12)
        # The sum in the basis that was found is what came out.
        inside = left @ (left.T @ torch.stack(x).sum(0) @ right) @ right.T
        close(dense(merged), inside, FP64)
    close(dense(ctm(given, Method(name="ctm"), 13)), torch.stack(x).sum(0), FP64)


def test_pico_and_the_norm_that_goes_with_it() -> None:
    given = deltas()
    expected = twins.pico(plain(given), list(STRENGTHS))
    for one, other in zip(pico(given), expected, strict=True):
        close(dense(one.change), other, FP64)
    total = torch.stack([s * m for s, m in zip(STRENGTHS, expected, strict=True)]).sum(0)
    norm = sum(float(x.norm()) for x in signed(given)) / len(given)
    close(found(Method(calibrate="pico"), given), total * norm / total.norm(), FP64)


def test_the_norm_that_is_asked_for() -> None:
    given = deltas()
    mean = sum(float(x.norm()) for x in signed(given)) / len(given)
    whole = float(torch.stack(signed(given)).sum(0).norm())
    for name in ("ties", "karcher", "iso-c"):
        assert float(found(Method(name=name, match_norm="mean"), given).norm()) == pytest.approx(
            mean, rel=FP32
        )
        matched = found(Method(name=name, match_norm="linear", lambda_=-2.0), given)
        assert float(matched.norm()) == pytest.approx(2 * whole, rel=FP32)


@pytest.mark.parametrize("name", [n for n in MENU if MENU[n].family == "elementwise"])
def test_tiles_of_any_size_make_the_same_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = deltas((60, 44))
    whole = found(Method(name=name), given)
    monkeypatch.setattr(tiles, "BLOCK", 700)
    monkeypatch.setattr(tiles, "COLUMNS", 19)
    torch.testing.assert_close(found(Method(name=name), given), whole, rtol=1e-4, atol=1e-4)
    assert bool(((found(Method(name=name), given) == 0) == (whole == 0)).all())


@pytest.mark.parametrize("name", list(MENU))
def test_normalize_makes_a_mean(name: str) -> None:
    given = deltas(strengths=(0.6, 1.0) if name == "slerp" else (0.6, 1.0, 0.4), seed=3)
    whole = sum(d.strength for d in given)
    once = found(Method(name=name, normalize=True), given)
    twice = [Delta(change=d.change, strength=3 * d.strength, owner=d.owner) for d in given]
    close(found(Method(name=name, normalize=True), twice), once, FP32)
    if MENU[name].family == "sum" or name in ("dare-linear", "magnitude", "karcher"):
        close(once, found(Method(name=name), given) / whole, FP32)


@pytest.mark.parametrize("name", [n for n in MENU if n != "linear"])
def test_matrices_and_factors_mix(name: str) -> None:
    """A full difference beside a LoRA: the same as both as factors, as both as matrices."""
    # Of LoRAs that oppose each other model-stock leaves nothing.
    given = deltas(strengths=(0.8, 0.5), seed=3)
    mixed = [Delta(change=dense(given[0].change), strength=0.8, owner="lora0"), given[1]]
    close(found(Method(name=name), mixed), found(Method(name=name), given), 1e-4)


@pytest.mark.parametrize("name", [n for n in MENU if n != "linear"])
def test_a_bias_is_one_column(name: str) -> None:
    column = [torch.randn(30, 1, dtype=torch.float64) for _ in range(2)]
    given = [Delta(change=c, strength=1.0, owner=str(i)) for i, c in enumerate(column)]
    answer = found(Method(name=name), given)
    assert answer.shape == (30, 1) and bool(answer.isfinite().all())


@pytest.mark.parametrize("name", [n for n in MENU if n != "linear"])
@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_a_change_of_zero_among_them_is_no_harm(name: str, space: str) -> None:
    if space != "full" and not MENU[name].spaces:
        pytest.skip("acts in no space")
    given = deltas(strengths=(0.8, -0.5))
    zero = Factors(up=torch.zeros(60, 2).double(), down=torch.zeros(2, 44).double())
    given[1] = Delta(change=zero, strength=1.0, owner="zero")
    method = Method(name=name, space=space if MENU[name].spaces else None)
    assert bool(found(method, given).isfinite().all())
