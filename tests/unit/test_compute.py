"""Work that is shared out over threads."""

import threading
from collections.abc import Iterator

from lorakit.compute import Compute, ordered_map


def test_a_worker_may_be_the_one_that_lets_go() -> None:
    """The garbage collector runs in any thread; no worker can wait for itself."""
    got, closed, errors = threading.Event(), threading.Event(), []
    jobs: Iterator[int]

    def work(item: int) -> int:
        if item:
            got.wait(10)
            try:
                jobs.close()  # type: ignore[attr-defined]
            except RuntimeError as error:
                errors.append(error)
            closed.set()
        return item

    jobs = ordered_map(work, [0, 1], compute=Compute(threads=1), cost=lambda item: 0)
    assert next(jobs) == 0
    got.set()
    assert closed.wait(10) and not errors
    assert list(jobs) == []
