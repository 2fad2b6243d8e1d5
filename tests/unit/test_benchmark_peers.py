"""Peers are measured beside lorakit where they are installed, and their absence hurts nobody."""

import ast
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ROOT, bench_peers
from benchmarks.options import Options
from benchmarks.peers import result, with_mergekit

SMALL = Options(factor=16)
PEERS = {"peft", "lycoris", "mergekit", "sd_mecha"}


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", bench_peers.PEERS, ids=lambda peer: peer.PACKAGE)
def test_a_peer_is_measured_beside_lorakit(peer: Any, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    if result.installed(peer.PACKAGE) is None:
        pytest.skip(f"needs {peer.PACKAGE}")
    monkeypatch.setattr(bench_peers, "PEERS", (peer,))
    assert bench_peers.run(SMALL)
    assert peer.PACKAGE in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_left_out_in_one_line(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    absent = SimpleNamespace(PACKAGE="no-such-package-anywhere")
    monkeypatch.setattr(bench_peers, "PEERS", (absent,))
    assert bench_peers.run(SMALL)
    assert capsys.readouterr().out == "  no-such-package-anywhere is not installed\n"


def test_a_less_exact_result_than_the_peers_is_wrong(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = (result.Took(seconds=1.0, error=error) for error in (0.2, 0.1))
    found = result.Compared(job="this", ours=ours, theirs=theirs)
    peer = SimpleNamespace(PACKAGE="pytest", compared=lambda given: [found])
    monkeypatch.setattr(bench_peers, "PEERS", (peer,))
    assert not bench_peers.run(SMALL)
    assert "ratio 1.0" in capsys.readouterr().out


def test_no_peer_is_imported_before_it_is_measured() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & PEERS, path


def test_ties_in_float64_trims_elects_and_takes_a_weighted_mean() -> None:
    one = torch.tensor([[9.0, 8.0, 1.0, 1.0, 1.0, 7.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    two = torch.tensor([[8.0, -20.0, 1.0, 1.0, 1.0, 0.0, 9.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    found = with_mergekit.ties([one, two, torch.zeros_like(one)])
    # Of each the three largest stay; 8 · 1 loses the vote against -20 · 0.5.
    expected = [(9 + 4) / 1.5, -20.0, 0.0, 0.0, 0.0, 7.0, 9.0, 0.0, 0.0, 0.0]
    assert found.tolist() == [pytest.approx(expected)]
