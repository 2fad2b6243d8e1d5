"""The fuzz tests under a fuzzer that is guided by coverage: `python -m tests.fuzz SECONDS [NAME]`.

Needs the extra `fuzz`. What it finds is kept in .cache/fuzz, so that the next run goes on from
there; an input that fails is kept there too, and by hypothesis, which tries it first from then on.
"""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import atheris

# pytest's settings name this folder; here nobody reads them.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
CACHE = Path(".cache/fuzz")
MEMORY = 4096
"""MiB that the process may take, torch's own included."""
SLOW = 30
"""Seconds after which an input counts as one that hangs."""

with atheris.instrument_imports(include=["lorakit"]):
    import lorakit

    # Commands import most of it only when they run, too late to be watched.
    for module in walk_packages(lorakit.__path__, "lorakit."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    from tests.fuzz import test_fuzz

TARGETS = {
    name.removeprefix("test_"): test
    for name, test in vars(test_fuzz).items()
    if name.startswith("test_")
}


def main() -> None:
    seconds, *names = sys.argv[1:] or ["60"]
    if len(names) == 1:
        fuzz(names[0], seconds)
    failed = []
    for name in names or TARGETS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", seconds, name]
        if subprocess.run(command).returncode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def fuzz(name: str, seconds: str) -> None:
    """Fuzz one target; never returns."""
    corpus = CACHE / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = (
        *(f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY}", f"-timeout={SLOW}"),
        *(
            "-max_len=8192",
            "-len_control=0",
            "-print_final_stats=1",
            f"-artifact_prefix={CACHE}/{name}-",
        ),
    )
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name].hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
