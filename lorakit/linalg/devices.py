"""Getting matrices to the device where they are worked on."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Writer = Callable[[Tensor], None]
"""Writes a matrix into the room that it is given."""
_ROOMS = 2


def stacked(matrices: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return matrices of one shape and dtype as [b, m, n] on a device; see `filled`.

    A single matrix that is there already stays where it is.
    """
    first = matrices[0]
    if len(matrices) == 1 and first.device == device:
        return first[None]
    return filled([partial(_copy, one) for one in matrices], first.shape, device, first.dtype)


def filled(
    writers: Sequence[Writer],
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return matrices of one shape as [b, m, n] on a device, each written by its writer.

    On the CPU each is written where it stays; to a graphics card they go by way of two pinned
    buffers in turn, so that one is filled while the other is on its way.

    Args:
        writers: write a matrix [m, n] into the one that they are given, one after another.
        shape: (m, n).
        device: where to.
        dtype: of the matrices.
    """
    result = torch.empty(len(writers), *shape, dtype=dtype, device=device)
    if device == torch.device("cpu"):
        for write, place in zip(writers, result, strict=True):
            write(place)
        return result
    pinned = device.type == "cuda"
    rooms = [
        torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
        for _ in range(min(_ROOMS, len(writers)))
    ]
    sent = [_event() if pinned else None for _ in rooms]
    for number, write in enumerate(writers):
        room, event = rooms[number % len(rooms)], sent[number % len(rooms)]
        if event is not None:
            # An event that was never recorded is over at once.
            event.synchronize()
        write(room)
        result[number].copy_(room, non_blocking=pinned)
        if event is not None:
            event.record()
    return result


def _copy(matrix: Tensor, room: Tensor) -> None:
    room.copy_(matrix)


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
