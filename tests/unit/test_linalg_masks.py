"""Random streams: a function of the name alone, for ever."""

import math

import numpy as np
import torch

from lorakit.linalg.masks import gaussian, stream

GOLDEN_WORDS = ["13a240602e34821a", "4eafc9cda2e10572"]
GOLDEN_BITS = [3214508957, 981586605, 3198096068]


def test_the_stream_of_a_name_never_changes() -> None:
    words = stream("unet.mid_block").random_raw(2)
    assert [f"{word:016x}" for word in words] == GOLDEN_WORDS


def test_the_numbers_of_a_name_never_change() -> None:
    assert gaussian("unet.mid_block", (3,)).numpy().view(np.uint32).tolist() == GOLDEN_BITS


def test_names_are_independent_and_order_does_not_matter() -> None:
    first, other = gaussian("a", (64, 64)), gaussian("b", (64, 64))
    assert torch.equal(first, gaussian("a", (64, 64)))
    # The correlation of 4096 pairs has a deviation of 1/64.
    assert abs(float((first * other).mean())) < 5 / 64


def test_the_numbers_are_nearly_normal() -> None:
    many = gaussian("c", (400, 500)).double()
    count = many.numel()
    assert abs(float(many.mean())) < 5 / math.sqrt(count)
    assert abs(float((many**2).mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((many**4).mean()) - (3 - 1.2 / 8)) < 0.1
    assert gaussian("c", (0, 4)).shape == (0, 4)
