"""The arguments that every benchmark takes."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which models, how wide, and how much is checked."""

    architecture: str
    factor: int
    samples: int
    threads: int | None


def parse(description: str | None, default: str, arguments: list[str] | None = None) -> Options:
    """Read the command line of one benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--architecture", choices=("sd1", "sdxl", "flux"), default=default)
    parser.add_argument("--factor", type=int, default=1, help="divide every width: a quick try")
    parser.add_argument("--samples", type=int, default=12, help="layers checked in float64")
    parser.add_argument("--threads", type=int, help="lorakit's workers")
    found = parser.parse_args(arguments)
    return Options(
        architecture=found.architecture,
        factor=found.factor,
        samples=found.samples,
        threads=found.threads,
    )
