"""Getting matrices to the device where they are worked on."""

from collections.abc import Iterable

import torch
from torch import Tensor

_ROOMS = 2


def stacked(matrices: Iterable[Tensor], count: int, device: torch.device) -> Tensor:
    """Return matrices of one shape as [b, m, n] on a device.

    To a graphics card they go by way of two pinned buffers in turn, so that one is filled while the
    other is on its way; a single matrix that is there already stays where it is.

    Args:
        matrices: [m, n] each, made one after another, never more than one at a time.
        count: how many, at least one.
        device: where to.
    """
    following = iter(matrices)
    first = next(following)
    if count == 1 and first.device == device:
        return first[None]
    pinned = device.type == "cuda"
    result = torch.empty(count, *first.shape, dtype=first.dtype, device=device)
    rooms = [
        torch.empty(first.shape, dtype=first.dtype, pin_memory=pinned)
        for _ in range(min(_ROOMS, count))
    ]
    sent = [_event() if pinned else None for _ in rooms]
    for place in range(count):
        room, event = rooms[place % len(rooms)], sent[place % len(rooms)]
        if event is not None:
            # An event that was never recorded is over at once.
            event.synchronize()
        room.copy_(first if place == 0 else next(following))
        result[place].copy_(room, non_blocking=pinned)
        if event is not None:
            event.record()
    return result


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
