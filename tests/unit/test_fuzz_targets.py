"""`make fuzz` finds its targets, also where its fuzzer is not installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_FUZZER = """
from contextlib import nullcontext

def instrument_imports(include):
    return nullcontext()
"""


def test_every_fuzz_test_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text(NO_FUZZER, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-c", "from tests.fuzz.__main__ import TARGETS; print(*TARGETS)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert not found.returncode, found.stderr
    written = (ROOT / "tests" / "fuzz" / "test_fuzz.py").read_text(encoding="utf-8")
    assert len(found.stdout.split()) == written.count("\ndef test_") > 5
