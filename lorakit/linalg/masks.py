"""Random streams that depend on a name alone: not on order, threads, device or a global state."""

import math
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_WORDS_A_NUMBER = 2
_LANES = 8
_LANE_BITS = 16
_LANES_A_WORD = 4
_WORDS_A_STEP = 4


def stream(name: str) -> np.random.Philox:
    """Return the counter-based stream that belongs to a name; read it with `random_raw` alone.

    Source: `random_raw` of a bit generator is the part of NumPy that never changes (NEP 19).
    """
    digest = blake2b(name.encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def gaussian(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return nearly normal fp32 numbers, mean 0 and variance 1, the same bits on every platform.

    Each number is the sum of eight uniform 16-bit integers, so that no logarithm or cosine of one
    machine's library comes in; random sketches need no heavier tails.

    Args:
        name: of the stream.
        shape: of the result.
    """
    count = math.prod(shape)
    words = stream(name).random_raw(_WORDS_A_NUMBER * count).reshape(_WORDS_A_NUMBER, count)
    total = np.zeros(count, dtype=np.int64)
    for row in words:
        for shift in range(0, 64, _LANE_BITS):
            lane = (row >> np.uint64(shift)) & np.uint64(2**_LANE_BITS - 1)
            total += lane.view(np.int64)
    # Twice the sum less its mean is an odd or even integer below 2^20: exact in float64.
    centred = (2 * total - _LANES * (2**_LANE_BITS - 1)).astype(np.float64)
    deviation = math.sqrt(_LANES * (4.0**_LANE_BITS - 1) / 12)
    return torch.from_numpy((centred / (2 * deviation)).astype(np.float32)).reshape(shape)


def lanes(name: str, start: int, count: int) -> np.ndarray:
    """Return uniform 16-bit integers of a stream from one of its positions on.

    Any part of a stream can be read by itself: what a mask is at an element depends on nothing but
    the name and the element's position.

    Args:
        name: of the stream.
        start: the position of the first.
        count: how many.
    """
    found = stream(name)
    # A step of the counter gives four words of four lanes.
    steps, skipped = divmod(start, _WORDS_A_STEP * _LANES_A_WORD)
    found.advance(steps)
    words = found.random_raw(-(-(skipped + count) // _LANES_A_WORD))
    return words.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]
