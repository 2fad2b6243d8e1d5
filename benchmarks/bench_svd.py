"""The two truncated SVDs on one thread, against torch's own and one product of their width."""

from collections.abc import Callable
from dataclasses import dataclass

import seeded
import torch
from torch import Tensor

from benchmarks import measure, truth
from benchmarks.options import Options
from lorakit.compute import one_blas_thread
from lorakit.linalg.dense import truncated_svds
from lorakit.linalg.factored import Factors, decomposed

DENSE = (
    (320, 320, 32),
    (640, 640, 32),
    (1280, 1280, 32),
    (1280, 11520, 32),
    (10240, 1280, 32),
    (1280, 1280, 128),
)
"""Rows, columns, rank."""
FACTORED = (1280, 1280, 128, 32)
"""Rows, columns, rank before and after."""
LARGEST_EXACT = 1280
"""The longer side up to which the exact SVD is waited for."""
TOGETHER = 4
OVERSAMPLING, NITER = 8, 2
"""Of `svd_lowrank`: columns beyond the rank, and its own default of power iterations."""
SECONDS = 1.0
MOST = 1.01
"""Times the error of the best of that rank."""

Usv = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A matrix on a device, the error of its best approximation, and a clock."""

    exact: Tensor
    given: Options
    rank: int
    best: float

    @staticmethod
    def of(exact: Tensor, given: Options, rank: int) -> "_Matrix":
        return _Matrix(exact=exact, given=given, rank=rank, best=truth.best_error(exact, rank))

    def ms(self, function: Callable[[], object]) -> float:
        """Return the milliseconds of the fastest call."""
        seconds = SECONDS / self.given.factor
        return 1e3 * measure.fastest(function, seconds=seconds, device=self.given.device)

    def times_best(self, usv: Usv) -> float:
        """Return the error of the leading directions, relative to the smallest there is."""
        u, s, v = (part[:, : self.rank] if part.ndim == 2 else part[: self.rank] for part in usv)
        product = (u.cpu().double() * s.cpu().double()) @ v.cpu().double().T
        return truth.relative_error(product, self.exact) / self.best


def run(given: Options) -> bool:
    """Show milliseconds, products, and how much worse than the best of that rank each is."""
    print(f"  one thread, on {measure.device_name(given.device)}")
    with one_blas_thread():
        right = [
            _dense(rows // given.factor, columns // given.factor, rank // given.factor, given)
            for rows, columns, rank in DENSE
        ]
        right.append(_factored(given))
    return all(right)


def _dense(rows: int, columns: int, rank: int, given: Options) -> bool:
    matrix = _Matrix.of(tuned(rows, columns), given, rank)
    delta = matrix.exact.float().to(given.device)
    several = torch.stack([delta] * TOGETHER)
    (found,) = truncated_svds(delta[None], rank=rank)
    excess = matrix.times_best((found.u, found.s, found.v))
    ours = matrix.ms(lambda: truncated_svds(delta[None], rank=rank))
    together = matrix.ms(lambda: truncated_svds(several, rank=rank)) / TOGETHER
    width = 3 * rank // 2
    rate = measure.gemm_rate(width=width, seconds=SECONDS / given.factor, device=given.device)
    limit = 1e3 * 2 * delta.numel() * width / rate
    print(
        f"  {rows} x {columns}, rank {rank}: lorakit {ours:.2f} ms ({together:.2f} ms each of "
        f"{TOGETHER} together), {found.passes} products, {excess:.4f} times the best error; "
        f"limit {limit:.2f} ms (one product of width {width} at {rate / 1e9:.0f} GFLOP/s), "
        f"ratio {ours / limit:.1f}"
    )
    _show_peer(
        f"svd_lowrank(q={rank + OVERSAMPLING}, niter={NITER})",
        lambda: torch.svd_lowrank(delta, q=rank + OVERSAMPLING, niter=NITER),
        matrix,
        ours,
    )
    if max(rows, columns) <= LARGEST_EXACT:
        _show_peer("linalg.svd", lambda: _exact(delta), matrix, ours)
    return excess <= MOST


def _factored(given: Options) -> bool:
    rows, columns, before, after = (size // given.factor for size in FACTORED)
    up, down = seeded.factors("factored", rows, columns, seed=0, rank=before)
    factors = Factors(up=up.to(given.device), down=down.to(given.device))
    matrix = _Matrix.of(up.double() @ down.double(), given, after)
    found = decomposed(factors).first(after)
    ours = matrix.ms(lambda: decomposed(factors).first(after))
    excess = matrix.times_best((found.u, found.s, found.v))
    print(
        f"  {rows} x {columns} of rank {before} to {after}: factored {ours:.2f} ms, "
        f"{excess:.6f} times the best error"
    )
    dense = "the product and linalg.svd"
    _show_peer(dense, lambda: _exact(factors.up @ factors.down), matrix, ours)
    return excess <= MOST


def _exact(delta: Tensor) -> Usv:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u, s, vh.mT


def _show_peer(name: str, function: Callable[[], Usv], matrix: _Matrix, ours: float) -> None:
    theirs, times_best = matrix.ms(function), matrix.times_best(function())
    print(
        f"    {name} {theirs:.2f} ms, ratio {theirs / ours:.2f}, {times_best:.4f} times the best "
        "error",
        flush=True,
    )


def tuned(rows: int, columns: int) -> Tensor:
    """Return what a fine-tuning adds [m, n] in fp64: rank 64, σ falling as 1/i, and noise."""
    up, down = seeded.factors("tuned", rows, columns, seed=0, rank=64)
    noise = seeded.weight("noise", (rows, columns), seed=0)
    return up.double() @ down.double() + 0.1 * noise.double()
