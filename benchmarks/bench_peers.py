"""Other packages on the same inputs in the same run; one that is not installed is left out."""

from benchmarks.options import Options
from benchmarks.peers import with_lycoris, with_mergekit, with_peft, with_sd_mecha
from benchmarks.peers.result import installed

PEERS = (with_peft, with_lycoris, with_mergekit, with_sd_mecha)
MOST = 1.01
"""Times the peer's error: both do the same, so nobody may be quicker by being less exact."""


def run(given: Options) -> bool:
    """Show seconds, their ratio, and both errors against the truth in float64."""
    right = True
    for peer in PEERS:
        version = installed(peer.PACKAGE)
        if version is None:
            print(f"  {peer.PACKAGE} is not installed")
            continue
        for found in peer.compared(given):
            print(found.line(f"{peer.PACKAGE} {version}"), flush=True)
            right &= found.ours.error <= MOST * found.theirs.error
    return right
