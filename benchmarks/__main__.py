"""Run a set of benchmarks: python -m benchmarks [NAME]... [options of each]."""

import argparse

from benchmarks import (
    bench_apply,
    bench_extract,
    bench_merge,
    bench_methods,
    bench_resize,
    measure,
)

BENCHMARKS = {
    "merge": bench_merge,
    "resize": bench_resize,
    "extract": bench_extract,
    "apply": bench_apply,
    "methods": bench_methods,
}


def main() -> None:
    """Run the benchmarks that are named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    given, passed_on = parser.parse_known_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    print(measure.versions())
    for name in given.names or BENCHMARKS:
        print(f"\n{name}", flush=True)
        BENCHMARKS[name].main(passed_on)


if __name__ == "__main__":
    main()
