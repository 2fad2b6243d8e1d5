"""The elementwise methods on dense float64 matrices, in the plainest words, without lorakit."""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

Matrices = list[Tensor]
MEANS = ("ties", "della-ties")


def lanes(method: str, seed: int, owner: str, module: str, count: int) -> Tensor:
    """Return the 16-bit parts of a Philox stream, the lowest of each word first."""
    name = "\n".join(["lorakit.mask.v1", method, str(seed), owner, module])
    key = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 4)).tolist()
    return torch.tensor([word >> shift & 65535 for word in words for shift in (0, 16, 32, 48)])


def trim(x: Tensor, density: float, gamma: float = 0.0, least: int = 1) -> Tensor:
    """Keep a share of the elements: the largest but for the share gamma, the first of equals."""
    whole = x.numel()
    count = max(least, int(density * whole))
    outliers = min(int(gamma * whole), whole - count)
    order = sorted(range(whole), key=lambda i: -abs(float(x.flatten()[i])))
    mask = torch.zeros(whole, dtype=torch.float64)
    mask[order[outliers : outliers + count]] = 1.0
    return x * mask.reshape(x.shape)


def trim_rows(x: Tensor, density: float, gamma: float = 0.0, least: int = 1) -> Tensor:
    return torch.stack([trim(row, density, gamma, least) for row in x])


def drop(x: Tensor, lane: Tensor, density: float, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """Return the mask, and the chances: of DARE all alike, of DELLA by the rank in the row."""
    rank = x.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
    last = max(1, x.shape[1] - 1)
    chance = torch.full_like(x, density)
    if epsilon is not None and x.shape[1] > 1:
        chance = density - epsilon + 2 * epsilon * rank / last
    levels = (chance * 65536).round().clamp(1, 65536)
    return lane[: x.numel()].reshape(x.shape) < levels, levels / 65536


def thinned(x: Tensor, mask: Tensor, chance: Tensor, flavor: str) -> Tensor:
    """mergekit makes up for what is dropped by the L1 norm, all others by the chance."""
    kept = x * mask
    if flavor == "mergekit":
        return kept * (x.abs().sum() / kept.abs().sum())
    return kept / chance


def summed(kept: Matrices, strengths: list[float], flavor: str, normalize: bool) -> Tensor:
    total = sum(s * x for s, x in zip(strengths, kept, strict=True))
    whole = sum(strengths) if flavor == "mergekit" else sum(map(abs, strengths))
    return total / whole if normalize else total  # type: ignore[return-value,operator]


def vote(
    kept: Matrices, strengths: list[float], flavor: str, votes: str, normalize: bool
) -> Tensor:
    """Elect a sign for each element; combine the LoRAs that have it; all conventions."""
    x, s = torch.stack(kept), torch.tensor(strengths, dtype=torch.float64).reshape(-1, 1, 1)
    voices = {"lorakit": s.sign(), "mergekit": s}.get(flavor, torch.ones_like(s)) * x
    mass, number = voices.sum(0), voices.sign().sum(0)
    sign = (mass if votes == "mass" else number).sign()
    if flavor == "lorakit":
        sign = torch.where(sign == 0, mass.sign(), sign)
    elif flavor == "paper":
        sign = torch.where(sign == 0, sign.sum().sign(), sign)
    else:
        sign = torch.where(sign == 0, 1.0, sign)
    agrees = (voices.sign() == sign) & (voices != 0)
    total = (s * x * agrees).sum(0)
    size, number = (s.abs() * agrees).sum(0), agrees.double().sum(0)
    if flavor == "mergekit":
        share = (s * agrees).sum(0)
        return total / torch.where(share == 0, 1.0, share) if normalize else total
    if flavor == "lorakit" and not normalize:
        total = total * s.abs().mean()
    share = size if flavor == "lorakit" or normalize else number
    return total / torch.where(share == 0, 1.0, share)


def sce(x: Matrices, density: float, flavor: str) -> Tensor:
    """Keep by variance, weigh by mean square, average those of the majority's sign."""
    stack = torch.stack(x)
    variance = ((stack - stack.mean(0)) ** 2).mean(0)
    live = variance.numel() if flavor == "lorakit" else int((variance > 0).sum())
    if density < 1:
        mask = trim(variance, int(density * live) / variance.numel() + 1e-12, least=0)
        stack = stack * (mask > 0)
    weights = (stack**2).mean((1, 2))
    faint = float(weights.sum()) < (1e-6 if flavor == "mergekit" else 1e-300)
    weights = torch.ones_like(weights) / len(x) if faint else weights / weights.sum()
    sign = stack.sum(0).sign()
    if flavor == "mergekit":
        sign = torch.where(sign == 0, 1.0, sign)
    shares = weights.reshape(-1, 1, 1) * ((stack.sign() == sign) & (stack != 0))
    return (shares * stack).sum(0) / shares.sum(0).clamp(
        min=1e-6 if flavor == "mergekit" else 1e-300
    )
