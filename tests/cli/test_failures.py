"""A write that fails or is interrupted leaves no output, and the old file intact."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.tensorfile import writer
from tests.helpers import run

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(tmp_path: Path, sd15: Path, sd15_lora: Path) -> Path:
    """Make a folder with a checkpoint, a LoRA and an old output."""
    (tmp_path / "base.safetensors").write_bytes(sd15.read_bytes())
    (tmp_path / "lora.safetensors").write_bytes(sd15_lora.read_bytes())
    (tmp_path / "out.safetensors").write_bytes(b"the old file")
    return tmp_path


@posix
def test_a_reader_that_has_enough_is_no_failure_to_tell(folder: Path) -> None:
    """As in `lorakit presets | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "presets"],
        cwd=folder, env=environment(), stdout=writer, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def is_as_before(folder: Path) -> bool:
    names = sorted(path.name for path in folder.iterdir())
    old = (folder / "out.safetensors").read_bytes() == b"the old file"
    return old and names == ["base.safetensors", "lora.safetensors", "out.safetensors"]


@posix
@pytest.mark.parametrize("into", [True, False])
def test_a_full_disk_leaves_the_old_file(folder: Path, into: bool) -> None:
    limit = 100_000
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "import lorakit.cli; lorakit.cli.main()"
    )
    more = ["--into", "base.safetensors"] if into else []
    arguments = ["merge", "lora.safetensors", *more, "-o", "out.safetensors", "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "out.safetensors" in done.stderr
    assert is_as_before(folder)


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_write_leaves_the_old_file(folder: Path, sent: signal.Signals) -> None:
    """Each tensor takes its time, so that the signal comes in the middle of the write."""
    # Shells mute the interrupt for jobs in the background.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import time, lorakit.models as models; get = models.Rounded.get;"
        "models.Rounded.get = lambda self, key: (time.sleep(0.1), get(self, key))[1];"
        "import lorakit.cli; lorakit.cli.main()"
    )
    names = ("lora.safetensors", "--into", "base.safetensors", "-o", "out.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "merge", *names, "--overwrite", "--threads", "1"],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(folder.glob(".out*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert (folder / "out.safetensors").stat().st_size == len(b"the old file")
    if sent == signal.SIGINT:
        assert process.returncode == 130, errors
        assert errors.strip() == "lorakit: interrupted; no output was left half-written."
        assert is_as_before(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_whatever_raises_in_the_middle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    stream = writer.stream

    def broken(file: object, source: object, **more: object) -> int:
        stream(file, source, **more)  # type: ignore[arg-type]
        raise error("in the middle")

    monkeypatch.setattr(writer, "stream", broken)
    monkeypatch.chdir(folder)
    result = run("merge", "lora.safetensors", "-o", "out.safetensors", "--overwrite")
    assert result.exit_code == 1
    assert is_as_before(folder)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(folder: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = run("merge", folder / "lora.safetensors", "-o", locked / "out.safetensors")
    assert result.exit_code == 1
    assert not list(locked.iterdir())
