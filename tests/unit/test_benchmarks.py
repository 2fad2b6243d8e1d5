"""Every benchmark runs, on small models and in this process, and sees a wrong result."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import (
    bench_gpu,
    bench_methods,
    bench_start,
    bench_svd,
    full_size,
    measure,
    options,
    process,
    truth,
    watching,
)
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.options import Options
from lorakit.compute import Compute
from lorakit.linalg.dense import truncated_svd
from tests import reference
from tests.helpers import ran

SMALL = Options(factor=32, samples=3)
Command = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Command]]:
    """Run lorakit in this process, and measure the machine in no time; yield what was run."""
    commands: list[Command] = []

    def lorakit(*arguments: str | Path, given: Options) -> process.Measured:
        commands.append(arguments)
        report = ran(*arguments, "--device", given.device)
        return process.Measured(seconds=2.0, peak=2**20, device=given.device, report=report)

    monkeypatch.setattr(full_size, "FOLDER", folder)
    monkeypatch.setattr(process, "lorakit", lorakit)
    monkeypatch.setattr(process, "start", lambda device="cpu": 0.5)
    monkeypatch.setattr(measure, "gemm_rate", lambda **_: 1e9)
    monkeypatch.setattr(bench_svd, "SECONDS", 0.0)
    monkeypatch.setattr(bench_methods, "METHODS", ("linear",))
    yield commands


@pytest.mark.parametrize("name", ["merge", "resize", "extract", "apply", "methods"])
def test_an_operation_is_measured_and_right(name: str, small: list[Command], capsys) -> None:  # type: ignore[no-untyped-def]
    assert BENCHMARKS[name](SMALL)
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "without the start of 0.50 s" in line]
    assert len(lines) == len(small) > 0
    assert all(" on cpu: 2.00 s" in line and "peak 1 MiB" in line for line in lines)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system keeps what it read")
@pytest.mark.parametrize("cold", [True, False])
def test_what_is_to_be_read_from_disk_is_dropped_from_memory(cold: bool, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[-1]))
    assert BENCHMARKS["extract"](replace(SMALL, cold=cold))
    assert dropped == [os.POSIX_FADV_DONTNEED] * (8 if cold else 0), "twice two models, twice"


@pytest.mark.parametrize("damaged", ["weights", "others"])
def test_a_wrong_merge_is_seen(damaged: str, folder: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    bake = process.lorakit

    def damaging(*arguments: str | Path, given: Options) -> process.Measured:
        took = bake(*arguments, given=given)
        if "--into" in arguments:
            out = Path(arguments[arguments.index("-o") + 1])
            tensors, touched = (
                load_file(out),
                {layer.key for layer in truth.layers("sd1", factor=32)},
            )
            for key, tensor in tensors.items():
                if (key in touched) == (damaged == "weights"):
                    tensor += 1
            save_file(tensors, out)
        return took

    monkeypatch.setattr(process, "lorakit", damaging)
    assert not BENCHMARKS["methods"](SMALL)


def test_a_ratio_leaves_out_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    took = process.Measured(seconds=2.0, peak=0, device="cpu", report={})
    measure.show("this", took, limit=1.5, limit_name="limit", size=10**9)
    assert "0.50 GB/s" in (shown := capsys.readouterr().out)
    assert "ratio 1.33, 1.00 without the start of 0.50 s" in shown


def test_the_svds_are_measured_and_near_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_svd.run(Options(factor=8))
    shown = capsys.readouterr().out
    assert shown.count("svd_lowrank") == len(bench_svd.DENSE)
    assert "factored" in shown


def test_a_worse_svd_is_seen() -> None:
    exact = bench_svd.tuned(80, 96)
    matrix = bench_svd._Matrix.of(exact, SMALL, 4)
    found = truncated_svd(exact.float(), rank=4)
    assert matrix.times_best((found.u, found.s, found.v)) == pytest.approx(1.0, abs=1e-3)
    assert matrix.times_best((found.u, 0.9 * found.s, found.v)) > bench_svd.MOST


def test_without_a_card_one_line_says_so(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.run(SMALL)
    assert capsys.readouterr().out == "  no CUDA device on this machine: nothing is measured\n"


@pytest.mark.filterwarnings("ignore")
def test_the_measurement_of_a_card_runs_on_the_cpu(small: list[Command], capsys) -> None:  # type: ignore[no-untyped-def]
    assert bench_gpu.measured(SMALL)
    assert [command[0] for command in small] == ["extract", "extract", "resize", "resize"]
    shown = capsys.readouterr().out
    assert shown.count("within the tolerance: yes") == 2
    shares = [line for line in shown.splitlines() if "of matrix work" in line]
    assert len(shares) == 2
    assert not any("(0%)" in line for line in shares)


@pytest.mark.parametrize("wrong", ["scaled", "missing"])
def test_a_result_that_differs_from_the_cpus_is_seen(wrong: str, folder: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    job = bench_gpu._resizing(SMALL)
    right, other = folder / "right.safetensors", folder / "wrong.safetensors"
    ran(*job.command, "-o", right, "--overwrite")
    tensors = load_file(right)
    name = job.layers[5].name
    if wrong == "missing":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    else:
        tensors[f"{name}.lora_up.weight"] *= 1.1
    save_file(tensors, other)
    assert bench_gpu._agreement(job, [right, right], SMALL)
    assert not bench_gpu._agreement(job, [right, other], SMALL)
    assert "within the tolerance: no" in capsys.readouterr().out


def test_the_distance_of_factors_is_that_of_matrices(folder: Path) -> None:
    files = [truth.File(full_size.lora("sd1", 8, factor=32, seed=seed)) for seed in (0, 1)]
    layer = truth.layers("sd1", factor=32)[7]
    one, other = (file.delta(layer) for file in files)
    found = truth.distance(files[0], files[1], layer)
    assert found == pytest.approx(reference.relative_error(other, one), rel=1e-9)
    assert truth.distance(files[0], files[0], layer) < 1e-12


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0.0),
        ([(0.0, 1.0), (2.0, 4.0)], 3.0),
        ([(2.0, 4.0), (0.0, 3.0)], 4.0),
        ([(0.0, 9.0), (1.0, 2.0), (3.0, 4.0)], 9.0),
    ],
)
def test_time_that_several_workers_share_counts_once(
    spans: list[watching.Span], expected: float
) -> None:
    assert watching.covered(spans) == expected


def test_a_profile_tells_kernels_from_copies() -> None:
    found = watching.profile_of(
        [
            {"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 2e6},
            {"cat": "kernel", "name": "gemm", "ts": 1e6, "dur": 2e6},
            {"cat": "gpu_memcpy", "name": "to", "ts": 0, "dur": 5e5, "args": {"bytes": 10}},
            {"cat": "gpu_memcpy", "name": "to", "ts": 0, "dur": 5e5, "args": {"bytes": 20}},
            {"cat": "cuda_runtime", "name": "launch", "ts": 0, "dur": 9e6},
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found.kernels == pytest.approx(3.0)
    assert found.by_name == {"gemm": pytest.approx(4.0)}
    assert found.copies == {"to": watching.Copies(size=30, seconds=1.0)}


@pytest.mark.filterwarnings("ignore")
def test_what_a_card_did_is_told(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    did = watching.Profile(
        kernels=1.5,
        by_name={f"kernel {number}": 0.1 * number for number in range(12)},
        copies={"Memcpy HtoD": watching.Copies(size=3 * 10**9, seconds=0.5)},
    )
    called: list[Compute] = []
    job = replace(bench_gpu._resizing(SMALL), call=called.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7 * 2**20)
    monkeypatch.setattr(bench_gpu, "read_profile", lambda trace: did)
    bench_gpu._show_card(job, Compute())
    assert called == [Compute()]
    shown = capsys.readouterr().out
    assert "1.50 s with a kernel" in shown
    assert "Memcpy HtoD: 3.00 GB in 0.50 s, 6.00 GB/s" in shown
    assert "5 MiB, 7 MiB reserved" in shown
    assert "1.100 s kernel 11" in shown
    assert "kernel 3" not in shown


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_the_cpu_has_no_kernels(tmp_path: Path) -> None:
    with watching.profiled(tmp_path / "trace.json", "cpu"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert "aten::mm" in (tmp_path / "trace.json").read_text(encoding="utf-8")
    found = watching.read_profile(tmp_path / "trace.json")
    assert found == watching.Profile(kernels=0.0, by_name={}, copies={})


def test_starts_are_measured(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench_start, "ROUNDS", 1)
    assert bench_start.run(SMALL)
    assert capsys.readouterr().out.count(" s, peak ") == 6


def test_the_architecture_is_no_name_of_a_benchmark() -> None:
    names, given = options.parse("", BENCHMARKS, ["extract", "--architecture", "flux"])
    assert (names, given.architecture) == (["extract"], "flux")
    names, given = options.parse("", BENCHMARKS, ["--architecture", "sdxl", "--threads", "1"])
    assert (names, given) == (list(BENCHMARKS), Options(architecture="sdxl", threads=1))
    assert options.parse("", BENCHMARKS, [])[1].architecture == "sd1"
    assert options.parse("", BENCHMARKS, ["gpu"])[1].architecture == "sdxl"


def test_an_unknown_benchmark_and_a_wrong_result_are_refused(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no benchmark nothing" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["benchmarks", "svd"])
    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", {"svd": lambda given: False})
    with pytest.raises(SystemExit, match="wrong results: svd"):
        main()
