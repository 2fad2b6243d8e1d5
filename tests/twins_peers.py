"""What other tools compute, in float64: their formulas, which docs/coming-from speaks of.

A LoRA here is (up, down, alpha); ΔW is alpha / rank · up @ down.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]


def unrelated(*ranks: int, size: int = 320, seed: int = 1) -> list[Lora]:
    """Return LoRAs of norm 1 that have nothing in common, alpha half the rank."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rank in ranks:
        up = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        down = torch.randn(rank, size, generator=generator, dtype=torch.float64)
        made.append((2 * up / (up @ down).norm(), down, rank / 2))
    return made


def delta(lora: Lora) -> Tensor:
    up, down, alpha = lora
    return alpha / len(down) * (up @ down)


def total(loras: Sequence[Lora], strengths: Sequence[float]) -> Tensor:
    """Return what is meant: the sum of strength · ΔW."""
    return torch.stack([s * delta(lora) for lora, s in zip(loras, strengths, strict=True)]).sum(0)


def kohya_plain(loras: Sequence[Lora], ratios: Sequence[float]) -> Tensor:
    """merge_lora.py: s = ratio · √(α / α₁); Σ|s|·up times Σs·down, at the first one's α / r."""
    _, first, alpha = loras[0]
    scales = [ratio * (a / alpha) ** 0.5 for (_, _, a), ratio in zip(loras, ratios, strict=True)]
    up = sum(abs(s) * lora[0] for s, lora in zip(scales, loras, strict=True))
    down = sum(s * lora[1] for s, lora in zip(scales, loras, strict=True))
    return alpha / len(first) * torch.as_tensor(up) @ torch.as_tensor(down)


def kohya_concat(loras: Sequence[Lora], ratios: Sequence[float]) -> Tensor:
    """merge_lora.py --concat: the same factors side by side, α₁ over the sum of the ranks."""
    alpha = loras[0][2]
    scales = [ratio * (a / alpha) ** 0.5 for (_, _, a), ratio in zip(loras, ratios, strict=True)]
    up = torch.cat([abs(s) * lora[0] for s, lora in zip(scales, loras, strict=True)], 1)
    down = torch.cat([s * lora[1] for s, lora in zip(scales, loras, strict=True)])
    return alpha / len(down) * up @ down


def clamped(change: Tensor, rank: int, quantile: float = 0.99) -> Tensor:
    """The extraction of kohya and supermerger: up = U·S, down = Vᵀ, both cut at a quantile."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], v[:rank]
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile)
    return up.clamp(-most, most) @ down.clamp(-most, most)


def supermerger_plain(loras: Sequence[Lora], ratios: Sequence[float], *, same: bool) -> Tensor:
    """Merge with dimension "no": Σc·up times Σc·down; "same to Strength" takes roots and signs."""
    _, first, alpha = loras[0]
    ups, downs = [], []
    for (up, down, a), ratio in zip(loras, ratios, strict=True):
        scale = (abs(ratio) ** 0.5 if same else ratio) * (a / alpha) ** 0.5
        ups.append(scale * up)
        downs.append(scale * down * (-1 if same and ratio < 0 else 1))
    return alpha / len(first) * torch.stack(ups).sum(0) @ torch.stack(downs).sum(0)


def dare_node(lora: Lora, p: float, generator: torch.Generator) -> Tensor:
    """DARE Merge LoRA Stack: each factor's entries stay with the chance p, divided by 1 − p."""
    up, down, _ = lora
    masks = [torch.rand(part.shape, generator=generator) < p for part in (up, down)]
    return (up * masks[0] / (1 - p)) @ (down * masks[1] / (1 - p))


def dare(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE, arXiv 2311.03099: elements of ΔW stay with the chance `density`, divided by it."""
    return change * (torch.rand(change.shape, generator=generator) < density) / density
