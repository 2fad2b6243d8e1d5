"""The leading directions of a dense matrix, and how much they leave out."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg.factored import fixed_signs as signed
from lorakit.linalg.masks import gaussian as signs
from lorakit.linalg.ranks import RankRule, choose_rank

OVERSAMPLING = 16
GAIN = 2e-3
"""Another pass must lower the squared error by this share, or it is not worth its time."""
MOST_PASSES = 24
SIZE_RANKS = 256
_CANCELS = 1e-4
_TINY, _HUGE = 1e-12, 1e12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TruncatedSvd:
    """The leading directions of a matrix: `u` [m, k], `s` [k] falling, `v` [n, k].

    `energy_total` is ‖matrix‖², `residual` the measured ‖matrix − u s vᵀ‖ / ‖matrix‖, `passes` how
    often the matrix was multiplied, `note` what the reader should know.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    energy_total: float
    residual: float
    exact: bool
    passes: int = 0
    note: str = ""


def truncated_svd(
    delta: Tensor, *, rank: int, method: str = "auto", seed_name: str = ""
) -> TruncatedSvd:
    """Return the `rank` leading directions of a matrix.

    Args:
        delta: [m, n] in fp32.
        rank: directions, capped by m and n.
        method: "exact", "fast" (block subspace iteration), or "auto", which takes "exact" for
            small matrices and for ranks that are a large share of it.
        seed_name: names the random stream of the test matrix.

    Raises:
        NumericsError: a value is NaN or infinite.

    Source: Halko, Martinsson and Tropp (2011), algorithm 4.4, stopped by the measured energy.
    """
    low, high = (float(end) for end in torch.aminmax(delta))
    size = max(abs(low), abs(high))
    if not math.isfinite(size):
        raise NumericsError("holds NaN or infinity; check the inputs for damage")
    rank = min(rank, *delta.shape)
    if size == 0.0:
        return _zero(delta)
    if not _TINY < size < _HUGE:
        found = truncated_svd(delta / size, rank=rank, method=method, seed_name=seed_name)
        return replace(found, s=found.s * size, energy_total=found.energy_total * size * size)
    width = rank + OVERSAMPLING
    small = min(delta.shape) <= 2 * width
    if method == "exact" or small:
        return _exact(delta, rank)
    return _fast(delta, rank, width, seed_name)


def svd_for_rule(
    delta: Tensor, rule: RankRule, *, conv: bool, method: str = "auto", seed_name: str = ""
) -> TruncatedSvd:
    """Return as many leading directions as a rank rule needs to decide.

    Rules on the spectrum grow the sketch until it decides them; a rule on Σσ needs the whole
    spectrum. `rule.size` is decided over all layers, from at most 256 directions of each.

    Args:
        delta: [m, n] in fp32.
        rule: the rank rule.
        conv: whether the kernel is over 1x1.
        method: as for `truncated_svd`.
        seed_name: as for `truncated_svd`.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    most = min(delta.shape)
    cap = min(rule.cap(conv) or most, most)
    if rule.whole:
        return truncated_svd(delta, rank=cap, method=method, seed_name=seed_name)
    if rule.size is not None:
        cap = min(cap, SIZE_RANKS)
        return truncated_svd(delta, rank=cap, method=method, seed_name=seed_name)
    if rule.sv_sum is not None:
        found = truncated_svd(delta, rank=most, method="exact", seed_name=seed_name)
        return _first(found, choose_rank(found.s, rule, conv=conv))
    rank = 32
    while True:
        rank = min(rank, cap)
        found = truncated_svd(delta, rank=rank, method=method, seed_name=seed_name)
        chosen = choose_rank(found.s, rule, conv=conv, energy_total=found.energy_total)
        if chosen < len(found.s) or rank >= cap or len(found.s) < rank:
            return _first(found, chosen)
        rank *= 2


def _first(found: TruncatedSvd, rank: int) -> TruncatedSvd:
    s = found.s[:rank]
    rest = max(0.0, found.energy_total - float((s**2).sum()))
    residual = math.sqrt(rest / found.energy_total) if found.energy_total else 0.0
    return replace(
        found, u=found.u[:, :rank], s=s, v=found.v[:, :rank], residual=max(residual, found.residual)
    )


def _zero(delta: Tensor) -> TruncatedSvd:
    m, n = delta.shape
    return TruncatedSvd(
        u=delta.new_zeros(m, 0),
        s=torch.zeros(0, dtype=torch.float64, device=delta.device),
        v=delta.new_zeros(n, 0),
        energy_total=0.0,
        residual=0.0,
        exact=True,
    )


def _exact(delta: Tensor, rank: int) -> TruncatedSvd:
    """Take the eigenvectors of the smaller Gram matrix in float64.

    fp32 values leave singular values below 1e-8 of the largest to rounding whichever way they are
    computed, so that squaring the condition in float64 loses nothing.
    """
    wide = delta.shape[0] <= delta.shape[1]
    side = delta.double() if wide else delta.double().T
    note = ""
    try:
        values, vectors = torch.linalg.eigh(side @ side.T)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        left, values, _ = torch.linalg.svd(side.cpu(), full_matrices=False)
        values, vectors = (values**2).flip(0).to(side.device), left.flip(1).to(side.device)
        note = "the eigenvalues did not converge; decomposed by SVD on the CPU"
    energy = float((side**2).sum())
    values = values.flip(0)[:rank].clamp_min(0)
    near = vectors.flip(1)[:, :rank]
    s = values.sqrt()
    alive = int((s > s[0] * 1e-8).sum())
    near, s = near[:, :alive], s[:alive]
    far = (side.T @ near) / s
    u, v = (near, far) if wide else (far, near)
    u, v = signed(u, v)
    rest = max(0.0, energy - float((s**2).sum()))
    return TruncatedSvd(
        u=u.float(),
        s=s,
        v=v.float(),
        energy_total=energy,
        residual=math.sqrt(rest / energy),
        exact=True,
        note=note,
    )


def _fast(delta: Tensor, rank: int, width: int, seed_name: str) -> TruncatedSvd:
    """Multiply by the matrix and its transpose in turn until the captured energy stands still."""
    rows = torch.linalg.vector_norm(delta, dim=1).double()
    energy = float((rows**2).sum())
    sides = (delta, delta.T)
    basis = signs(f"sketch {seed_name}", (delta.shape[1], width)).to(delta.device)
    block, captured, passes = delta @ basis, 0.0, 1
    while True:
        basis = _orthonormal(block)
        block = sides[passes % 2] @ basis
        passes += 1
        values, vectors = _gram_eigh(block)
        now = float(values[:rank].sum())
        if now - captured <= GAIN * max(energy - now, _CANCELS * energy) or passes >= MOST_PASSES:
            break
        captured = now
    s = values[:rank].clamp_min(0).sqrt()
    alive = int((s > s[0] * 1e-7).sum()) if len(s) else 0
    s, turn = s[:alive], vectors[:, :alive].float()
    near, far = basis @ turn, (block @ turn) / s.float()
    # After an even number of passes the last block is deltaᵀ @ basis: basis is the left side.
    u, v = (near, far) if passes % 2 == 0 else (far, near)
    u, v = signed(u, v)
    rest = energy - float((s**2).sum())
    if rest < _CANCELS * energy:
        left = delta - (u * s.float()) @ v.T
        rest = float((torch.linalg.vector_norm(left, dim=1).double() ** 2).sum())
    note = "" if passes < MOST_PASSES else f"stopped after {passes} passes"
    return TruncatedSvd(
        u=u,
        s=s,
        v=v,
        energy_total=energy,
        residual=math.sqrt(rest / energy),
        exact=False,
        passes=passes,
        note=note,
    )


def _orthonormal(block: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns: Cholesky QR with a float64 Gram matrix.

    Where columns are dependent to fp32 the Householder QR does it.
    """
    wide = block.double()
    lower, info = torch.linalg.cholesky_ex(wide.T @ wide)
    diagonal = lower.diagonal()
    if int(info) or float(diagonal.min()) < 1e-6 * float(diagonal.max()):
        basis: Tensor = torch.linalg.qr(block)[0]
        return basis
    solved: Tensor = torch.linalg.solve_triangular(lower, wide.T, upper=False)
    return solved.T.float()


def _gram_eigh(block: Tensor) -> tuple[Tensor, Tensor]:
    wide = block.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    return values.flip(0), vectors.flip(1)
