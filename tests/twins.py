"""The papers' formulas on dense float64 matrices, in the plainest words.

Each takes the signed ΔW of one layer, x = strength · ΔW, unless it says otherwise.
"""

import torch
from torch import Tensor

Matrices = list[Tensor]


def top(x: Tensor, density: float) -> Tensor:
    """Keep the largest magnitudes."""
    count = max(1, int(density * x.numel()))
    least = x.abs().flatten().sort(descending=True).values[count - 1]
    return x * (x.abs() >= least)


def ties_paper(deltas: Matrices, strengths: list[float], cuts: list[float]) -> Tensor:
    """Trim below a magnitude each, elect on raw values, average the strengths' terms that agree."""
    kept = torch.stack([d * (d.abs() >= cut) for d, cut in zip(deltas, cuts, strict=True)])
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (sign != 0)
    terms = kept * torch.tensor(strengths, dtype=torch.float64).reshape(-1, 1, 1)
    return (terms * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def ties(deltas: Matrices, strengths: list[float], density: float) -> Tensor:
    """Elect on sign(s) · trimmed ΔW; Σ s τ · c with c = Σ|s| / (T Σ|s| of those that agree)."""
    s = torch.tensor(strengths, dtype=torch.float64).reshape(-1, 1, 1)
    kept = torch.stack([top(d, density) for d in deltas])
    votes = kept * s.sign()
    agrees = votes.sign() == votes.sum(0).sign()
    share = (s.abs() * agrees * (kept != 0)).sum(0)
    total = (s * kept * agrees).sum(0) * s.abs().sum() / len(strengths)
    return torch.where(share > 0, total / share.clamp(min=1e-300), 0.0)


def breadcrumbs_rows(
    deltas: Matrices, strengths: list[float], density: float, gamma: float
) -> Tensor:
    """Leave out the largest and the smallest of each row, then sum."""
    total = torch.zeros_like(deltas[0])
    for delta, strength in zip(deltas, strengths, strict=True):
        columns = delta.shape[1]
        count, outliers = int(density * columns), int(gamma * columns)
        order = delta.abs().argsort(dim=1, descending=True)
        mask = torch.zeros_like(delta).scatter_(1, order[:, outliers : outliers + count], 1.0)
        total += strength * delta * mask
    return total


def slerp(x: Matrices, share: float) -> Tensor:
    """Turn unit vectors along their arc; the norm is the weighted mean of the norms."""
    norms = [m.norm() for m in x]
    a, b = (m / n for m, n in zip(x, norms, strict=True))
    angle = (a * b).sum().acos()
    unit = ((1 - share) * angle).sin() / angle.sin() * a + (share * angle).sin() / angle.sin() * b
    return unit * ((1 - share) * norms[0] + share * norms[1])


def karcher_gradient(unit: Tensor, x: Matrices, weights: list[float]) -> float:
    """Return the length of the weighted mean of the arcs from a point to the directions."""
    total = torch.zeros_like(unit)
    for matrix, weight in zip(x, weights, strict=True):
        other = matrix / matrix.norm()
        cosine = (unit * other).sum().clamp(-1, 1)
        flat = other - cosine * unit
        total += weight * cosine.acos() * flat / flat.norm()
    return float(total.norm())


def model_stock(x: Matrices) -> Tensor:
    """N c / (1 + (N − 1) c) times the sum, c the mean pairwise cosine."""
    count = len(x)
    pairs = [(a, b) for i, a in enumerate(x) for b in x[i + 1 :]]
    c = sum(float((a * b).sum() / a.norm() / b.norm()) for a, b in pairs) / len(pairs)
    return count * c / (1 + (count - 1) * c) * torch.stack(x).sum(0)


def svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def rank_of(x: Tensor) -> int:
    return int(torch.linalg.matrix_rank(x, rtol=1e-9))


def orthonormal(columns: Tensor) -> Tensor:
    """The polar factor, of the rank that the columns have."""
    u, s, vh = torch.linalg.svd(columns, full_matrices=False)
    live = s > 1e-6 * s[0]
    return u[:, live] @ vh[live]


def tsv(x: Matrices, share: int | None = None) -> Tensor:
    parts = [svd(m, share or rank_of(m)) for m in x]
    left, right = (orthonormal(torch.cat([p[i] for p in parts], dim=1)) for i in (0, 2))
    return left @ torch.cat([p[1] for p in parts]).diag() @ right.T


def iso_c(x: Matrices) -> Tensor:
    whole = torch.stack(x).sum(0)
    u, s, v = svd(whole, rank_of(whole))
    return s.mean() * u @ v.T


def iso_cts(x: Matrices, share: float) -> Tensor:
    whole = torch.stack(x).sum(0)
    rank = rank_of(whole)
    own = round((rank - int(rank * share)) / len(x))
    parts = [svd(whole, rank - own * len(x))]
    common = parts[0][0]
    parts += [svd(m - common @ common.T @ m, own) for m in x]
    left, right = (orthonormal(torch.cat([p[i] for p in parts], dim=1)) for i in (0, 2))
    return torch.cat([p[1] for p in parts]).mean() * left @ right.T


def knots(deltas: Matrices) -> tuple[Tensor, Matrices]:
    """U, and the ΣV_tᵀ blocks, of the ΔW side by side."""
    side = torch.cat(deltas, dim=1)
    u, s, v = svd(side, rank_of(side))
    return u, list((s[:, None] * v.T).split(deltas[0].shape[1], dim=1))


def core(deltas: Matrices) -> tuple[Tensor, Matrices, Tensor]:
    """Left basis, cores and right basis: those of the ΔW side by side, and stacked, at norm 1."""
    units = [d / d.norm() for d in deltas]
    wide, tall = torch.cat(units, dim=1), torch.cat(units, dim=0)
    u, _, _ = svd(wide, rank_of(wide))
    _, _, v = svd(tall, rank_of(tall))
    return u, [u.T @ d @ v for d in deltas], v


def tucker_energy(x: Matrices, left: Tensor, right: Tensor) -> float:
    return float(sum((left.T @ m @ right).square().sum() for m in x))


def ctm(x: Matrices, rank: int, gain: float = 1e-5) -> Tensor:
    """Turn by turn the best basis of one side for that of the other, until little is gained."""
    _, _, right = svd(torch.cat(x, dim=0), rank)
    before = -1.0
    while True:
        left, _, _ = svd(torch.cat([m @ right for m in x], dim=1), rank)
        right, _, _ = svd(torch.cat([m.T @ left for m in x], dim=1), rank)
        held = tucker_energy(x, left, right)
        if held <= before * (1 + gain):
            return left @ left.T @ torch.stack(x).sum(0) @ right @ right.T
        before = held


def pico(deltas: Matrices, strengths: list[float]) -> Matrices:
    """(1 + U diag(a − 1) Uᵀ) ΔW of each, U and σ those of [U₁√S₁ … U_T√S_T] of strength · ΔW."""
    sides = []
    for delta, strength in zip(deltas, strengths, strict=True):
        u, s, _ = svd(delta * abs(strength), rank_of(delta))
        sides.append(u * s.sqrt())
    u, s, _ = torch.linalg.svd(torch.cat(sides, dim=1), full_matrices=False)
    a = 1 / (1 + (len(deltas) - 1) * s.square() / s.square().sum())
    return [d + u @ (a - 1).diag() @ u.T @ d for d in deltas]
