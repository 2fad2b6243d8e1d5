"""What it takes to start: Python, torch, and the commands that need no torch."""

from benchmarks import full_size, process
from benchmarks.options import Options

ROUNDS = 5
WANTED = 0.3
"""Seconds, for a command that computes nothing."""


def run(given: Options) -> bool:
    """Show the fastest of several starts of each; nothing is computed in any of them."""
    model = full_size.checkpoint(given.architecture, factor=given.factor)
    lora = full_size.lora(given.architecture, 32, factor=given.factor)
    starts = {
        "python -c pass": ("-c", "pass"),
        "python -c 'import torch'": ("-c", "import torch"),
        "lorakit --help": ("-m", "lorakit", "--help"),
        "lorakit inspect MODEL": ("-m", "lorakit", "inspect", model),
        "lorakit inspect LORA": ("-m", "lorakit", "inspect", lora),
        "lorakit metadata show LORA": ("-m", "lorakit", "metadata", "show", lora),
    }
    bare = 0.0
    for title, arguments in starts.items():
        ran = process.quickest(arguments, rounds=ROUNDS)
        bare = bare or ran.seconds
        ours = title.startswith("lorakit")
        print(
            f"  {title}: {ran.seconds:.3f} s, peak {ran.peak / 2**20:.0f} MiB, "
            f"{ran.seconds / bare:.1f} times bare Python"
            + (f"; wanted at most {WANTED} s" if ours else ""),
            flush=True,
        )
        if ran.status:
            print(f"    failed with {ran.status}: {ran.errors}")
            return False
    return True
