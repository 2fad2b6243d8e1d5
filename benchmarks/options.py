"""The arguments of all benchmarks."""

import argparse
from collections.abc import Collection
from dataclasses import dataclass

QUICK, LARGE = "sd1", "sdxl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which models, how wide, how much is checked, where lorakit runs, and from disk or not."""

    architecture: str = QUICK
    factor: int = 1
    samples: int = 12
    threads: int | None = None
    device: str = "cpu"
    cold: bool = False


def parse(
    description: str | None, names: Collection[str], arguments: list[str] | None = None
) -> tuple[list[str], Options]:
    """Read the command line: the benchmarks to run, all of them if left out, and how.

    The models are SD 1.5, so that all benchmarks take minutes; but `gpu` by itself takes SDXL.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--architecture",
        choices=("sd1", "sdxl", "flux"),
        help="of the models: sd1 if left out, sdxl for gpu by itself",
    )
    parser.add_argument("--factor", type=int, default=1, help="divide every width: a quick try")
    parser.add_argument("--samples", type=int, default=12, help="layers checked in float64")
    parser.add_argument("--threads", type=int, help="lorakit's workers")
    parser.add_argument("--device", default="cpu", help="lorakit's device")
    parser.add_argument(
        "--cold", action="store_true", help="read files from disk, not from the kernel's memory"
    )
    found = parser.parse_args(arguments)
    unknown = [name for name in found.names if name not in names]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(names)}")
    return found.names or list(names), Options(
        architecture=found.architecture or (LARGE if found.names == ["gpu"] else QUICK),
        factor=found.factor,
        samples=found.samples,
        threads=found.threads,
        device=found.device,
        cold=found.cold,
    )
