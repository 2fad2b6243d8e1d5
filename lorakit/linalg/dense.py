"""The leading directions of a dense matrix, and how much they leave out."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg.factored import fixed_signs, numerical_rank
from lorakit.linalg.krylov import Leading, leading
from lorakit.linalg.ranks import RankRule, Scorer, choose_rank

TOLERANCE = 1e-3
SIZE_RANKS = 256
_SMALL = 256
_SHARE = 6
_BLOCK = 2**20
_CANCELS = 1e-3
_FADING = 1e-3
_TINY, _HUGE = 1e-12, 1e12

Found = tuple[Tensor, Tensor, Tensor, int, str]
"""Directions of the short side, σ, those of the long side, products taken, a note."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TruncatedSvd:
    """The leading directions of a matrix: `u` [m, k], `s` [k] falling in fp64, `v` [n, k].

    `energy_total` is ‖matrix‖², `residual` the measured ‖matrix − u s vᵀ‖ / ‖matrix‖, `passes` how
    often the matrix was multiplied, `note` what the reader should know. k is less than the rank
    asked for where the matrix has no more.
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
    delta: Tensor,
    *,
    rank: int,
    method: str = "auto",
    seed_name: str = "",
    tolerance: float = TOLERANCE,
) -> TruncatedSvd:
    """Return the `rank` leading directions of a matrix [m, n]; see `truncated_svds`."""
    (found,) = truncated_svds(
        delta[None], rank=rank, method=method, seed_name=seed_name, tolerance=tolerance
    )
    return found


def truncated_svds(
    deltas: Tensor,
    *,
    rank: int,
    method: str = "auto",
    seed_name: str = "",
    tolerance: float = TOLERANCE,
) -> list[TruncatedSvd]:
    """Return the `rank` leading directions of each of b matrices.

    Args:
        deltas: [b, m, n] in fp32 or fp64, any strides.
        rank: directions, capped by m and n.
        method: "exact", "fast" (block Golub-Kahan), or "auto": "exact" for small matrices and for
            ranks over a sixth of the smaller side.
        seed_name: names the random start of "fast".
        tolerance: "fast" stops once another product is estimated to be worth less of the error.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    rows, columns = deltas.shape[1:]
    # What has no fp64, a Mac's graphics card, leaves it to the CPU.
    lengths = torch.linalg.vector_norm(deltas, dim=2).cpu().double()
    if not lengths.numel() or not bool(_in_range(lengths.amax(dim=1)).all()):
        return [_rescaled(delta, rank, method, seed_name, tolerance) for delta in deltas]
    energies = lengths.square().sum(dim=1)
    wide = deltas if rows <= columns else deltas.mT
    least = min(rows, columns)
    rank = min(rank, least)
    fast = method == "fast" or (method == "auto" and least > max(_SMALL, _SHARE * rank))
    if fast and rank:
        some = leading(wide, rank, energy=energies, tolerance=tolerance, seed_name=seed_name)
        found = [_settled(one, matrix, method) for one, matrix in zip(some, wide, strict=True)]
    else:
        found = [_exact(matrix, rank) for matrix in wide]
    return [
        _finished(delta, (far, s, near) if rows > columns else (near, s, far), energy, passes, note)
        for delta, energy, (near, s, far, passes, note) in zip(
            deltas, energies.tolist(), found, strict=True
        )
    ]


def _settled(found: Leading, wide: Tensor, method: str) -> Found:
    """Return what was found, or what "auto" takes instead where it did not converge."""
    note = ""
    if found.worth:
        note = f"stopped after {found.half_passes} products; one more is worth {found.worth:.2%}"
        if method == "auto":
            return (*_exact(wide, len(found.s))[:4], f"{note}, so decomposed exactly")
    return found.u, found.s, found.v, found.half_passes, note


def _finished(
    delta: Tensor, usv: tuple[Tensor, Tensor, Tensor], energy: float, passes: int, note: str
) -> TruncatedSvd:
    """Fix the signs, leave out what is rounding noise, and measure what is left out."""
    u, v = fixed_signs(usv[0], usv[2])
    live = numerical_rank(usv[1], (len(u), len(v)))
    result = TruncatedSvd(
        u=u[:, :live],
        s=usv[1][:live].cpu(),
        v=v[:, :live],
        energy_total=energy,
        residual=0.0,
        exact=not passes,
        passes=passes,
        note=note,
    )
    return _measured(delta, result)


def svd_for_rule(
    delta: Tensor,
    rule: RankRule,
    *,
    conv: bool,
    method: str = "auto",
    seed_name: str = "",
    scorer: Scorer | None = None,
) -> TruncatedSvd:
    """Return as many leading directions as a rank rule needs to decide.

    Rules on the spectrum double the directions until they decide; a rule on Σσ, and none at all,
    need the whole spectrum. `rule.size` is decided over all layers, from at most 256 of each.

    Args:
        delta: [m, n] in fp32.
        rule: the rank rule.
        conv: whether the kernel is over 1x1.
        method: as for `truncated_svd`.
        seed_name: as for `truncated_svd`.
        scorer: what a threshold is compared with; one that may rank a small singular value high
            gets at most 256 to choose from.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    least = min(delta.shape)
    if scorer is not None and scorer.directional:
        rank = min(least, SIZE_RANKS)
        return truncated_svd(delta, rank=rank, method=method, seed_name=seed_name)
    if rule.sv_sum is not None:
        return truncated_svd(delta, rank=least, method="exact", seed_name=seed_name)
    shape = int(delta.shape[0]), int(delta.shape[1])
    fixed = fixed_rank(rule, conv=conv, shape=shape)
    if fixed is not None:
        return truncated_svd(delta, rank=fixed, method=method, seed_name=seed_name)
    cap = min(rule.cap(conv) or least, least)
    if method == "exact":
        return truncated_svd(delta, rank=cap, method=method, seed_name=seed_name)
    rank = min(32, cap)
    while True:
        found = truncated_svd(delta, rank=rank, method=method, seed_name=seed_name)
        scores = None if scorer is None else scorer.scores(found.s, found.energy_total)
        chosen = choose_rank(
            found.s, rule, conv=conv, energy_total=found.energy_total, scores=scores
        )
        if chosen < len(found.s) or len(found.s) < rank or rank == cap:
            return found
        # Each further direction holds no more than the last one: fewer than this cannot do.
        rank = min(max(2 * rank, _bound(found, rule)), cap)


def fixed_rank(rule: RankRule, *, conv: bool, shape: tuple[int, int]) -> int | None:
    """Return the directions that a rule asks of a matrix of a shape, None where it has to look."""
    cap = min(rule.cap(conv) or min(shape), *shape)
    if rule.size is not None:
        return min(cap, SIZE_RANKS)
    return cap if rule.whole else None


def _bound(found: TruncatedSvd, rule: RankRule) -> int:
    share = rule.energy if rule.error is None else 1 - rule.error**2
    if share is None:
        return 0
    missing = share * found.energy_total - float((found.s**2).sum())
    return len(found.s) + int(max(0.0, missing) / float(found.s[-1]) ** 2)


def _in_range(sizes: Tensor) -> Tensor:
    return (sizes > _TINY) & (sizes < _HUGE)


def _rescaled(
    delta: Tensor, rank: int, method: str, seed_name: str, tolerance: float
) -> TruncatedSvd:
    """Bring the entries near 1, so that no square over- or underflows; or tell zero, NaN, inf."""
    size = float(delta.abs().max()) if delta.numel() else 0.0
    if not math.isfinite(size):
        raise NumericsError("holds NaN or infinity; check the inputs for damage")
    if size == 0.0:
        empty = torch.zeros(0, dtype=torch.float64, device=delta.device)
        u, v = delta.new_zeros(delta.shape[0], 0), delta.new_zeros(delta.shape[1], 0)
        return TruncatedSvd(u=u, s=empty, v=v, energy_total=0.0, residual=0.0, exact=True)
    exponent = math.frexp(size)[1]
    power = 2.0**exponent
    found = truncated_svd(
        (delta / 2.0 ** (exponent // 2)) / 2.0 ** (exponent - exponent // 2),
        rank=rank,
        method=method,
        seed_name=seed_name,
        tolerance=tolerance,
    )
    return replace(found, s=found.s * power, energy_total=found.energy_total * power**2)


def _exact(wide: Tensor, rank: int) -> Found:
    """Take the eigenvectors of the Gram matrix [m, m] of wide [m, n] in fp64.

    The values are fp32, so what is below 6e-8 of the largest is rounding; the square root of eps
    in fp64 is a quarter of that.
    """
    note = ""
    if wide.device.type == "mps":
        wide = wide.cpu()
    try:
        values, vectors = torch.linalg.eigh(_gram(wide))
    except RuntimeError:
        # LinAlgError is a RuntimeError; another algorithm, on the CPU, may still converge.
        vectors, s, _ = torch.linalg.svd(wide.double().cpu(), full_matrices=False)
        values, vectors = (s**2).flip(0).to(wide.device), vectors.flip(1).to(wide.device)
        note = "eigenvalues did not converge; decomposed by SVD on the CPU"
    u = vectors.flip(1)[:, :rank]
    s = values.flip(0)[:rank].clamp(min=0).sqrt()
    live = numerical_rank(s, (len(wide), wide.shape[1]))
    u, s = u[:, :live], s[:live]
    # In fp32 the small ones would not be orthogonal to the large ones.
    faint = live and float(s[-1]) < _FADING * float(s[0])
    v = (wide.double().T @ u) / s if faint else (wide.T @ u.to(wide)) / s.to(wide)
    return u.to(wide), s, v.to(wide), 0, note


def _gram(wide: Tensor) -> Tensor:
    rows, columns = wide.shape
    total = torch.zeros(rows, rows, dtype=torch.float64, device=wide.device)
    step = max(rows, _BLOCK // rows)
    for start in range(0, columns, step):
        part = wide[:, start : start + step].double()
        total.addmm_(part, part.T)
    return total


def _measured(delta: Tensor, found: TruncatedSvd) -> TruncatedSvd:
    """Fill in the residual: by energies, or entry by entry where those cancel."""
    energy, captured = found.energy_total, float((found.s**2).sum())
    rest = energy - captured
    if rest < _CANCELS * energy:
        scaled = found.u * found.s.to(found.u.dtype).to(found.u.device)
        rest, step = 0.0, max(1, _BLOCK // delta.shape[1])
        for start in range(0, delta.shape[0], step):
            rows = slice(start, start + step)
            left = torch.addmm(delta[rows], scaled[rows], found.v.T, alpha=-1.0)
            norms = torch.linalg.vector_norm(left, dim=1).cpu().double()
            rest += float((norms**2).sum())
        energy = captured + rest
    return replace(found, residual=math.sqrt(rest / energy), energy_total=energy)
