"""What the results must be, in float64 and from the files alone, on modules spread over a model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import synthetic
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import flux
from benchmarks.layer import Layer


def layers(architecture: str, *, factor: int = 1, conv: bool = False) -> list[Layer]:
    """Return the layers of a kohya LoRA, with text encoders but for Flux."""
    if architecture == "flux":
        return flux.layers(factor=factor)
    original = synthetic.single_file(architecture, factor=factor)
    found = []
    for module in synthetic.modules(architecture, factor=factor):
        if module.kind != "conv" or conv:
            place = module.place
            found.append(
                Layer(
                    name=synthetic.spelled(module, architecture, "kohya"),
                    key=place.key,
                    rows=synthetic.row_range(place, original[place.key]),
                    shape=module.shape,
                )
            )
    return found


def spread(items: list[Layer], count: int) -> list[Layer]:
    """Return `count` layers evenly over the list, the first and the last among them."""
    if count >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def numel(items: Iterable[Layer]) -> int:
    """Return the number of weights in these layers."""
    return sum(math.prod(layer.shape) for layer in items)


def reduction_flops(items: Iterable[Layer], *, rank: int, kept: int) -> int:
    """Return the FLOPs that cutting factors of a rank takes: their Gram matrices, and the turns."""
    sides = sum(layer.shape[0] + math.prod(layer.shape[1:]) for layer in items)
    return 2 * sides * rank * (rank + kept)


FLOAT64_SUM = 2.0**-44
"""What the order of its terms may change of a float64 sum, relative."""


class File:
    """A .safetensors file, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        # Its methods carry no types.
        self._file = cast(Any, safe_open(path, framework="pt"))
        self.keys = frozenset(self._file.keys())

    def get(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def weight(self, layer: Layer) -> Tensor:
        """Return a layer's weight [m, n] in float64."""
        return self.get(layer.key)[slice(*layer.rows)].flatten(1).double()

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return a kohya LoRA's `up` [m, r] and `down` [r, n] as they are stored."""
        up, down = (self.get(f"{layer.name}.lora_{side}.weight") for side in ("up", "down"))
        return up.flatten(1), down.flatten(1)

    def delta(self, layer: Layer) -> Tensor:
        """Return a kohya LoRA's ΔW [m, n] in float64, zero where it lacks the layer."""
        if f"{layer.name}.lora_up.weight" not in self.keys:
            return torch.zeros(layer.shape, dtype=torch.float64).flatten(1)
        up, down = (factor.double() for factor in self.factors(layer))
        alpha = float(self.get(f"{layer.name}.alpha"))
        return (up @ down) * (alpha / down.shape[0])


def total(terms: Iterable[tuple[File, float]], layer: Layer) -> Tensor:
    """Return Σ strength · ΔW [m, n] of a layer in float64."""
    return torch.stack([strength * file.delta(layer) for file, strength in terms]).sum(0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def best_error(dense: Tensor, rank: int) -> float:
    """Return the relative error of the nearest matrix of this rank."""
    # The eigenvalues of the smaller Gram matrix: in float64 exact to 1e-8 of ‖dense‖, and fast.
    wide = dense if dense.shape[0] <= dense.shape[1] else dense.T
    squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0)
    return math.sqrt(float(squares[rank:].sum() / squares.sum()))


def products_within(dense: Tensor, rank: int, most: float) -> int:
    """Return how many products with `rank` directions an error of `most` times the best one takes.

    Each product is of the matrix with the newest block of a Krylov space, which loses nothing of
    what earlier products found; one that cannot be multiplied again needs two at the least.
    """
    wide = dense if dense.shape[0] <= dense.shape[1] else dense.T
    allowed, whole = (most * best_error(dense, rank)) ** 2, float(wide.square().sum())
    g = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[0], rank, generator=g, dtype=wide.dtype)
    basis, sides, products = torch.linalg.qr(start).Q, (wide.T, wide), 0
    while True:
        # Of the whole basis, whose older part need not be multiplied again.
        image = sides[products % 2] @ basis
        products += 1
        found = torch.linalg.svdvals(image)[:rank].square().sum()
        if whole - float(found) <= allowed * whole or basis.shape[1] >= len(wide):
            return products
        # With the start, which lies in the smaller side's space.
        grown = image if products % 2 else torch.cat([start, image], dim=1)
        basis = torch.linalg.qr(grown).Q


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """How results compare with the best of their rank: the mean error, and the largest ratio."""

    mean: float
    worst: float
    rank: int

    def __str__(self) -> str:
        return (
            f"mean error {self.mean:.4f}, at most {self.worst:.4f} times the best rank {self.rank}"
        )


def excess(found: Mapping[Layer, Tensor], exact: Mapping[Layer, Tensor], rank: int) -> Excess:
    """Compare results with the best of their rank."""
    worst, errors = 0.0, []
    for layer, expected in exact.items():
        best = best_error(expected, rank)
        errors.append(relative_error(found[layer], expected))
        worst = max(worst, errors[-1] / best if best > 1e-3 else 0.0)
    return Excess(mean=sum(errors) / len(errors), worst=worst, rank=rank)


def distance(one: File, other: File, layer: Layer) -> float:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW‖ of a layer in two kohya LoRAs, from factors that are [m, 2r]."""
    ups, downs = [], []
    for file, sign in ((one, 1.0), (other, -1.0)):
        up, down = (factor.double() for factor in file.factors(layer))
        scale = float(file.get(f"{layer.name}.alpha")) / down.shape[0]
        ups.append(up * (sign * scale))
        downs.append(down)
    whole = torch.linalg.vector_norm(_core(ups[:1], downs[:1]))
    return float(torch.linalg.vector_norm(_core(ups, downs)) / whole)


def _core(ups: list[Tensor], downs: list[Tensor]) -> Tensor:
    """Return a small matrix as long as up @ down, with no cancellation in its making."""
    left = torch.linalg.qr(torch.cat(ups, dim=1)).R
    right = torch.linalg.qr(torch.cat(downs).T).R
    core: Tensor = left @ right.T
    return core


def inexact(base: Path, out: Path, loras: Mapping[Path, float], checked: list[Layer]) -> list[str]:
    """Return the tensors of `out` that are not base + Σ strength · ΔW rounded once.

    Of the layers only those in `checked` are compared, of all other tensors every byte.
    """
    before, after = File(base), File(out)
    terms = [(File(path), strength) for path, strength in loras.items()]
    wrong = [f"{key}: in one file only" for key in sorted(before.keys ^ after.keys)]
    for layer in checked:
        found = after.get(layer.key)[slice(*layer.rows)].flatten(1)
        exact = before.weight(layer) + total(terms, layer)
        # Two orders of one float64 sum may fall on the two sides of a tie.
        sides = [nearest(exact * (1 + side * FLOAT64_SUM), found.dtype) for side in (-1, 1)]
        different = int(((found.double() != sides[0]) & (found.double() != sides[1])).sum())
        if different:
            wrong.append(f"{layer.name}: {different} of {exact.numel()} elements")
    return wrong


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp64 values rounded once to a narrow dtype, ties to even, still in fp64."""
    if dtype == torch.float16:
        return torch.from_numpy(values.numpy().astype(np.float16)).double()
    # bf16 keeps 8 bits, and its exponents reach as far as any weight's.
    mantissa, exponent = np.frexp(values.numpy())
    return torch.from_numpy(np.ldexp(np.rint(mantissa * 256) / 256, exponent))


def changed_elsewhere(base: Path, out: Path, touched: frozenset[str]) -> list[str]:
    """Return the tensors outside `touched` whose bytes differ."""
    before, after = File(base), File(out)
    return [
        key
        for key in sorted(before.keys - touched)
        if not _same_bytes(before.get(key), after.get(key))
    ]


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
