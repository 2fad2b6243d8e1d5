"""`extract` and `resize` on a graphics card against the CPU, and what the card is busy with."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lorakit
from benchmarks import full_size, measure, process, truth
from benchmarks.layer import Layer
from benchmarks.options import Options
from benchmarks.watching import Profile, covered, profiled, read_profile, watched
from lorakit.linalg.devices import stacked

RANK, WIDE = 32, 128
WIDTH = 48
SHAPE, COUNT = (1280, 5120), 16
"""Of the matrices whose way to the card is timed."""
KERNELS = 8
"""How many kernels are listed."""
CLOSE = 5e-3
"""What the errors of two approximations of one rank may differ by, relative."""
STORED = 2.0**-8
"""What two factors stored in fp16 or bf16 may change of a ΔW, relative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command, the same in Python, and the truth that its result is measured against.

    `exact` tells whether the result is the one best LoRA of its rank, not an approximation of it.
    """

    title: str
    command: tuple[str | Path, ...]
    call: Callable[[lorakit.Compute], object]
    inputs: tuple[Path, ...]
    layers: list[Layer]
    truth: Callable[[Layer], Tensor]
    exact: bool


def run(given: Options) -> bool:
    """Measure on CUDA, or say in one line that there is none."""
    device = given.device if given.device.startswith("cuda") else "cuda"
    if not torch.cuda.is_available():
        print("  no CUDA device on this machine: nothing is measured")
        return True
    return measured(replace(given, device=device))


def measured(given: Options) -> bool:
    """Compare the device with the CPU job by job; tell whether the results agree."""
    rate = measure.gemm_rate(width=WIDTH, seconds=1 / given.factor, device=given.device)
    print(
        f"  {measure.device_name(given.device)}: {rate / 1e9:.0f} GFLOP/s in fp32 "
        f"at width {WIDTH}, {process.start(given.device):.2f} s to start"
    )
    _show_transfers(given)
    agree = [_compared(job, given, rate) for job in (_extraction(given), _resizing(given))]
    return all(agree)


def _extraction(given: Options) -> Job:
    original = full_size.checkpoint(given.architecture, factor=given.factor)
    tuned = full_size.checkpoint(given.architecture, factor=given.factor, tuned=True)
    before, after = truth.File(original), truth.File(tuned)
    rule = lorakit.RankRule(rank=RANK, conv_rank=RANK)

    def call(compute: lorakit.Compute) -> lorakit.LoraFile:
        models = lorakit.open_source(original), lorakit.open_source(tuned)
        return lorakit.extract(*models, rule=rule, compute=compute)[0]

    ranks = ("--rank", str(RANK), "--conv-rank", str(RANK))
    return Job(
        title=f"extract at rank {RANK}",
        command=("extract", original, tuned, *ranks),
        call=call,
        inputs=(original, tuned),
        layers=truth.layers(given.architecture, factor=given.factor, conv=True),
        truth=lambda layer: after.weight(layer) - before.weight(layer),
        exact=False,
    )


def _resizing(given: Options) -> Job:
    wide = full_size.lora(given.architecture, WIDE, factor=given.factor, seed=1)

    def call(compute: lorakit.Compute) -> lorakit.LoraFile:
        rule = lorakit.RankRule(rank=RANK)
        return lorakit.resize(lorakit.load_lora(wide), rule=rule, compute=compute)[0]

    return Job(
        title=f"resize {WIDE} to {RANK}",
        command=("resize", wide, "--rank", str(RANK)),
        call=call,
        inputs=(wide,),
        layers=truth.layers(given.architecture, factor=given.factor),
        truth=truth.File(wide).delta,
        exact=True,
    )


def _show_transfers(given: Options) -> None:
    """Time lorakit's way to the device, by two buffers, against one copy of the same bytes."""
    rows, columns = (size // given.factor for size in SHAPE)
    device, cuda = torch.device(given.device), given.device.startswith("cuda")
    matrices = [torch.randn(rows, columns) for _ in range(COUNT)]
    source = torch.stack(matrices).pin_memory() if cuda else torch.stack(matrices)
    target = torch.empty(COUNT, rows, columns, device=device)
    seconds = partial(measure.fastest, seconds=1 / given.factor, device=given.device)
    once = seconds(lambda: target.copy_(source, non_blocking=True))
    ours = seconds(lambda: stacked(matrices, device))
    size = source.numel() * source.element_size()
    print(
        f"  to the device: {size / ours / 1e9:.2f} GB/s by two {'pinned ' if cuda else ''}buffers; "
        f"limit {size / once / 1e9:.2f} GB/s in one copy, ratio {ours / once:.2f}",
        flush=True,
    )


def _compared(job: Job, given: Options, rate: float) -> bool:
    """Run the command on both, then the same in Python on the device, watched."""
    size = sum(path.stat().st_size for path in job.inputs)
    outputs: list[Path] = []
    for device in ("cpu", given.device):
        on = replace(given, device=device)
        out = full_size.output(f"gpu-{len(outputs)}")
        limit = measure.read_all(*job.inputs)
        took = process.lorakit(*job.command, "-o", out, given=on)
        measure.show(job.title, took, limit=limit, limit_name="reading", size=size)
        outputs.append(out)
    agrees = _agreement(job, outputs, given)
    _watch(job, given, rate)
    for out in outputs:
        out.unlink()
    return agrees


def _agreement(job: Job, outputs: list[Path], given: Options) -> bool:
    """Compare every layer of the two files, and a sample of them with the truth."""
    files = [truth.File(path) for path in outputs]
    apart = {
        layer.name: truth.distance(files[0], files[1], layer)
        for layer in job.layers
        if f"{layer.name}.lora_up.weight" in files[0].keys & files[1].keys
    }
    name = max(apart, key=apart.__getitem__)
    mean = sum(apart.values()) / len(apart)
    print(
        f"  {len(apart)} layers against the CPU's: relative distance of ΔW {mean:.1e} on average, "
        f"{apart[name]:.1e} at most ({name})"
    )
    exact = {layer: job.truth(layer) for layer in truth.spread(job.layers, given.samples)}
    found = [
        truth.excess({layer: file.delta(layer) for layer in exact}, exact, RANK) for file in files
    ]
    for title, excess in zip(("cpu", given.device), found, strict=True):
        print(f"    {title}, {len(exact)} layers: {excess}")
    same = abs(found[1].mean - found[0].mean) <= CLOSE * found[0].mean
    agrees = same and (not job.exact or apart[name] <= STORED) and files[0].keys == files[1].keys
    print(f"    within the tolerance: {'yes' if agrees else 'no'}")
    return agrees


def _watch(job: Job, given: Options, rate: float) -> None:
    """Show the share of matrix work; of a card its memory and busiest kernels too."""
    compute = lorakit.Compute.of(device=given.device, threads=given.threads)
    if given.device.startswith("cuda"):
        # First, so that the libraries of the card are loaded when the clock runs.
        _show_card(job, compute)
    start = time.perf_counter()
    with watched(given.device) as spans:
        job.call(compute)
    seconds = time.perf_counter() - start
    solving, sending = covered(spans.solving), covered(spans.sending)
    least = 2 * truth.numel(job.layers) * WIDTH / rate
    print(
        f"  in this process on {given.device}: {seconds:.2f} s, of it {solving:.2f} s of matrix "
        f"work ({solving / seconds:.0%}) and {sending:.2f} s of sending, for batches with their "
        f"reading; these overlap; one product of width {WIDTH} a layer takes {least:.2f} s"
    )


def _show_card(job: Job, compute: lorakit.Compute) -> None:
    torch.cuda.reset_peak_memory_stats(compute.device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profiled(trace, compute.device):
            job.call(compute)
        _show_profile(read_profile(trace))
    held = torch.cuda.max_memory_allocated(compute.device)
    reserved = torch.cuda.max_memory_reserved(compute.device)
    print(f"  memory of the card: {held / 2**20:.0f} MiB, {reserved / 2**20:.0f} MiB reserved")


def _show_profile(found: Profile) -> None:
    print(f"  profile: {found.kernels:.2f} s with a kernel on the card")
    for name, copies in found.copies.items():
        print(
            f"    {name}: {copies.size / 1e9:.2f} GB in {copies.seconds:.2f} s, "
            f"{copies.size / max(copies.seconds, 1e-9) / 1e9:.2f} GB/s"
        )
    for name, seconds in _longest(found.by_name):
        print(f"    {seconds:.3f} s {name[:90]}")


def _longest(by_name: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(by_name.items(), key=lambda item: -item[1])[:KERNELS]
