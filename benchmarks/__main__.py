"""Run benchmarks: python -m benchmarks [NAME]... [--architecture sd1|sdxl|flux]."""

import sys
from collections.abc import Callable, Mapping

from benchmarks import (
    bench_apply,
    bench_extract,
    bench_gpu,
    bench_merge,
    bench_methods,
    bench_peers,
    bench_resize,
    bench_start,
    bench_svd,
    measure,
    options,
)

BENCHMARKS: Mapping[str, Callable[[options.Options], bool]] = {
    "start": bench_start.run,
    "svd": bench_svd.run,
    "merge": bench_merge.run,
    "resize": bench_resize.run,
    "extract": bench_extract.run,
    "apply": bench_apply.run,
    "methods": bench_methods.run,
    "peers": bench_peers.run,
    "gpu": bench_gpu.run,
}
"""Each tells whether the results are what they must be."""


def main() -> None:
    """Run the benchmarks that are named, or all of them."""
    names, given = options.parse(__doc__, BENCHMARKS)
    print(measure.versions())
    wrong = []
    for name in names:
        print(f"\n{name}", flush=True)
        if not BENCHMARKS[name](given):
            wrong.append(name)
    if wrong:
        sys.exit(f"wrong results: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
