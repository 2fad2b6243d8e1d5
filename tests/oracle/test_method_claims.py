"""The numbers that docs/methods.md tells of methods that we do not have, measured."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.linalg.factored import Factors
from lorakit.linalg.tiles import dense
from lorakit.methods.delta import Delta
from lorakit.methods.method import Method
from lorakit.methods.table import combine
from tests import twins
from tests.reference import relative_error

M, N, RANK, COUNT = 320, 256, 8, 3


def random(count: int = COUNT) -> list[Factors]:
    generator = torch.Generator().manual_seed(0)
    return [
        Factors(
            up=torch.randn(M, RANK, generator=generator, dtype=torch.float64),
            down=torch.randn(RANK, N, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def merged(name: str, changes: list[Factors], space: str | None = None, **options: float) -> Tensor:
    given = [Delta(change=c, strength=1.0, owner=str(i)) for i, c in enumerate(changes)]
    method = Method(name=name, space=space, **options)  # type: ignore[arg-type]
    return dense(combine(given, method.filled(into_lora=False), module="layer")).double()


def kept(x: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(x).square()
    return float(squares[:rank].sum() / squares.sum())


def test_ties_in_the_full_space_keeps_about_three_quarters_at_the_sum_of_the_ranks() -> None:
    whole = merged("ties", random(), "full")
    assert 0.65 < kept(whole, COUNT * RANK) < 0.8
    assert 0.3 < kept(whole, RANK) < 0.45
    assert kept(merged("ties", random(), "core"), COUNT * RANK) > 1 - 1e-12


def test_the_roots_of_weights_on_factors_miss_by_as_much_as_the_sum_is() -> None:
    """PEFT's linear: of two random LoRAs at 1 and 1 the cross terms are as large as the sum."""
    one, other = random(2)
    up, down = one.up + other.up, one.down + other.down
    assert relative_error(up @ down, dense(one) + dense(other)) == pytest.approx(1.0, abs=0.05)


def stacked_bases(changes: list[Factors]) -> Tensor:
    """Merge in the bases of the stacked factors, as the Core Space paper does."""
    u, _, _ = torch.linalg.svd(torch.cat([c.up for c in changes], dim=1), full_matrices=False)
    _, _, v = torch.linalg.svd(torch.cat([c.down for c in changes]), full_matrices=False)
    cores = [u.T @ dense(c) @ v.T for c in changes]
    return u @ twins.ties(cores, [1.0] * len(changes), 0.2) @ v


def test_bases_of_stacked_factors_hang_on_how_a_lora_is_factored() -> None:
    changes = random()
    turned = [Factors(up=10 * changes[0].up, down=changes[0].down / 10), *changes[1:]]
    assert relative_error(stacked_bases(turned), stacked_bases(changes)) > 0.7
    ours = [merged("ties", stack, "core") for stack in (turned, changes)]
    assert relative_error(*ours) < 1e-10


def polar(columns: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    return u @ vh


def test_the_dense_recipe_of_tsv_takes_directions_that_mean_nothing() -> None:
    changes, share = random(), min(M, N) // COUNT
    parts = [torch.linalg.svd(dense(c), full_matrices=False) for c in changes]
    left = polar(torch.cat([u[:, :share] for u, _, _ in parts], dim=1))
    right = polar(torch.cat([vh[:share].T for _, _, vh in parts], dim=1))
    recipe = left @ torch.cat([s[:share] for _, s, _ in parts]).diag() @ right.T
    assert relative_error(recipe, merged("tsv", changes)) == pytest.approx(0.6, abs=0.05)


def test_the_dense_recipe_of_iso_c_gives_most_to_directions_that_are_not_there() -> None:
    u, s, vh = torch.linalg.svd(sum(map(dense, random())), full_matrices=False)
    recipe = s.mean() * u @ vh
    outside = recipe - u[:, : COUNT * RANK] @ (u[:, : COUNT * RANK].T @ recipe)
    assert float(outside.square().sum() / recipe.square().sum()) > 0.9


def test_the_noise_of_dare_for_three_unrelated_loras_is_as_large_as_the_change() -> None:
    changes = random()
    whole = torch.stack([dense(c) for c in changes]).sum(0)
    noisy = merged("dare-linear", changes, "full", density=0.5)
    assert relative_error(noisy, whole) == pytest.approx(1.0, abs=0.05)
    u, s, vh = torch.linalg.svd(noisy)
    cut = COUNT * RANK
    left = u[:, :cut] @ s[:cut].diag() @ vh[:cut]
    assert relative_error(left, whole) == pytest.approx(0.45, abs=0.05)


def heavy() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal, other = (torch.randn(16, 8, generator=generator) for _ in range(2))
    return normal / other


def test_a_rescaling_by_norms_is_biased_where_a_tensor_is_small_and_one_by_chances_is_not() -> None:
    """mergekit's way for DARE: the sum of magnitudes as before, on a tensor with outliers."""
    x, rounds = heavy(), 4000
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(rounds, 16, 8, generator=generator) < 0.2) * x
    by_norm = masks * (x.abs().sum() / masks.abs().sum(dim=(1, 2)).clamp(min=1e-7))[:, None, None]
    norm_off, chance_off = (relative_error(y.mean(0), x) for y in (by_norm, masks / 0.2))
    assert norm_off > 0.1 > 2 * chance_off > 2 / math.sqrt(rounds)


@pytest.mark.peer
def test_mergekit_s_linear_of_weights_that_cancel_is_infinite() -> None:
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    base = pytest.importorskip("mergekit.merge_methods.base")
    group = base.TensorGroup.from_tensors([torch.ones(2), 2 * torch.ones(2)], ids=["a", "b"])
    weights = {"weight": {"a": 1.0, "b": -1.0}, "normalize": True}
    assert bool(registry.get("linear")([group], parameters=weights)[0].isinf().all())
