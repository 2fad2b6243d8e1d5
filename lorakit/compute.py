"""Where the work runs and how much of it at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import TypeVar

import torch

from lorakit.errors import SpecError

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT_MEMORY = 512 * 2**20
_MOST_ON_A_CARD = 8 * 2**30
_TOGETHER, _TOGETHER_ON_CPU = 32, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """The device of the linear algebra, the number of workers and the bytes in flight at once.

    `together` is how many layers of one shape a worker takes at once: a card wants many, and on a
    CPU four small ones take three quarters of the time of one after another. `narrow` rounds the
    factors of a LoRA as they are made, where they are to be stored in 16 bits: half the memory, for
    what is only saved.
    """

    device: str = "cpu"
    threads: int = 1
    memory: int = DEFAULT_MEMORY
    together: int = 1
    narrow: bool = False

    @staticmethod
    def of(
        *, device: str = "auto", threads: int | None = None, memory: int | None = None
    ) -> "Compute":
        """Choose what is left open: CUDA, then MPS, then CPU; a worker a core; 512 MiB in flight.

        On CUDA a quarter of the free memory is in flight, 8 GiB at the most.

        Raises:
            SpecError: the device is unknown or not there, or a number is not positive.
        """
        chosen = _device(device)
        workers = (os.cpu_count() or 1) if threads is None else threads
        budget = _budget(chosen) if memory is None else memory
        if workers < 1 or budget < 1:
            raise SpecError(
                f"--threads and --memory must be positive, found {workers} and {budget}."
            )
        together = _TOGETHER_ON_CPU if chosen == "cpu" else _TOGETHER
        return Compute(device=chosen, threads=workers, memory=budget, together=together)

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)


def _budget(device: str) -> int:
    """Return the bytes in flight where none are asked for: a card's own memory allows for more."""
    if not device.startswith("cuda"):
        return DEFAULT_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return max(DEFAULT_MEMORY, min(free // 4, _MOST_ON_A_CARD))


def _device(name: str) -> str:
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(
            f"Device '{name}' is unknown; use auto, cpu, cuda, cuda:N or mps."
        ) from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise SpecError(f"Device '{name}' is not on this machine; use --device auto or cpu.")
    return name


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give each worker one BLAS thread: more change the bits of QR and SVD, and slow them down.

    Products in fp32 stay whole: TF32 has 10 bits, and would decide ranks by its rounding.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    compute: Compute,
    cost: Callable[[Item], int] | None = None,
) -> Iterator[Result]:
    """Apply `function` in worker threads and yield the results in the order of `items`.

    Args:
        function: called under `torch.inference_mode`.
        items: drawn from only as far ahead as the budget allows.
        compute: how many workers, and how many bytes may be in flight.
        cost: the bytes that an item and its result take; without it an item a worker and two more.
    """
    # MKL counts its threads for each thread apart, and a new one begins with all cores.
    pool = ThreadPoolExecutor(compute.threads, initializer=torch.set_num_threads, initargs=(1,))
    owner = get_ident()
    waiting: deque[tuple[Future[Result], int]] = deque()
    in_flight = 0
    with one_blas_thread():
        try:
            for item in items:
                price = compute.memory // (compute.threads + 2) if cost is None else cost(item)
                while waiting and in_flight + price > compute.memory:
                    future, paid = waiting.popleft()
                    in_flight -= paid
                    yield future.result()
                waiting.append(
                    (pool.submit(_inferring, function, item, compute.torch_device), price)
                )
                in_flight += price
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()
            # Where the caller failed, the garbage collector closes this, in any thread: perhaps in
            # a worker, which cannot wait for itself.
            pool.shutdown(wait=get_ident() == owner)


def _inferring(function: Callable[[Item], Result], item: Item, device: torch.device) -> Result:
    with torch.inference_mode(), _own_stream(device):
        return function(item)


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a worker's products and copies do not wait for other workers'."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
