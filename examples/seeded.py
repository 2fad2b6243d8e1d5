"""Seeded numbers, and the dozen lines that put them into a .safetensors file."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from realnames import Shape
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
}
STD = 0.03
# One pool of normal numbers, read at an offset a tensor: as random as a test needs, as fast as a
# copy. Its length is prime, so no matrix that is larger than the pool repeats its rows.
POOL = 2**22 - 3


def weight(key: str, shape: Shape, *, seed: int, dtype: str = "F32") -> Tensor:
    """Return the weight of a tensor: N(0, 0.03), the same for ever for one (seed, key)."""
    if not DTYPES[dtype].is_floating_point:
        return torch.arange(math.prod(shape), dtype=DTYPES[dtype]).reshape(shape)
    pool = _pool(DTYPES[dtype])
    start, left = _hashed(seed, key) % POOL, math.prod(shape)
    pieces = []
    while left:
        pieces.append(pool[start : start + left])
        left -= pieces[-1].numel()
        start = 0
    return torch.cat(pieces).reshape(shape) if pieces else pool[:0].reshape(shape)


def factors(name: str, rows: int, columns: int, *, seed: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return up [m, r] and down [r, n]: ‖up @ down‖ is near 0.03 √(mn), σ_i falls as 1/i."""
    generator = torch.Generator().manual_seed(_hashed(seed, f"lora {name}"))
    decay = 1.0 / torch.arange(1, rank + 1)
    each_side = (STD * decay / decay.norm()).sqrt()
    up = torch.randn(rows, rank, generator=generator) * each_side
    down = torch.randn(rank, columns, generator=generator) * each_side[:, None]
    return up, down


def write_file(
    path: Path,
    specs: Mapping[str, tuple[str, Shape]],
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a .safetensors file tensor by tensor, in the order of safetensors' save_file.

    Args:
        path: the file; its folder is made.
        specs: (dtype name, shape) a key.
        get: returns a tensor of that dtype and shape.
        metadata: goes into the header.
    """
    order = save_order(specs)
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        dtype, shape = specs[key]
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(raw_bytes(get(key)))
    return path


@cache
def _pool(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(20230411)
    return (torch.randn(POOL, generator=generator) * STD).to(dtype)


def _hashed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def save_order(specs: Mapping[str, tuple[str, Shape]]) -> list[str]:
    """Sort keys as safetensors' save_file does: the widest dtype first, then by name."""
    return sorted(specs, key=lambda key: (-DTYPES[specs[key][0]].itemsize, key))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as safetensors stores them."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
