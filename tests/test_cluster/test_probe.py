from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ssn.cli.entry import main
from dist_ssn.cluster import load_cluster
from dist_ssn.cluster.probe import chosen_pairs, launcher_of


def test_pairs_are_spread_over_both_kinds() -> None:
    assert chosen_pairs([0, 0]) == [(0, 1)]
    assert chosen_pairs([0, 0, 1, 1]) == [(0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3)]
    pairs = chosen_pairs([rank // 8 for rank in range(64)], most=4)
    assert len(pairs) == len(set(pairs)) == 8
    assert [a // 8 == b // 8 for a, b in pairs] == [True] * 4 + [False] * 4
    assert len(chosen_pairs([rank // 8 for rank in range(4096)])) == 16


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, "torchrun"),
        ({"SLURM_JOB_ID": "3", "TORCHELASTIC_RUN_ID": "x"}, "slurm"),
        ({"CROSS_RANK": "0", "WORLD_SIZE": "2"}, "deepspeed"),
        ({"PMI_SIZE": "2"}, "mpirun"),
    ],
)
def test_launcher_of(environ: dict[str, str], launcher: str) -> None:
    assert launcher_of(environ) == launcher


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["probe"], "the following arguments are required: --output"),
        (["prob", "--output=x.yaml"], "invalid choice: 'prob'"),
        (["probe", "--output=/nowhere/x.yaml"], "--output: the folder /nowhere does not exist"),
        (["probe", "--output=x.txt"], "--output must name a file that ends in .yaml, got 'x.txt'"),
        (["probe", "--output=x.yaml"], "there is nothing to measure between fewer than two processes"),
    ],
)
def test_mistakes(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", *arguments]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.distributed
def test_a_probe_writes_a_file_that_launch_reads(tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "dist_ssn.cli", "launch", "--cluster", "local", "--nodes=1", "--"]
    result = subprocess.run(
        [*command, "cluster", "probe", f"--output={output}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    cluster = load_cluster(output)
    assert (cluster.nodes, cluster.processes_per_node, cluster.launcher, cluster.interface) == (1, 2, "torchrun", None)
    assert 1 < cluster.within.latency_us < 1e5 and cluster.within.bandwidth_mbit > 10
    assert (
        "# Measured by `dist-ssn cluster probe`, 20" in output.read_text() and "- within: pairs 1" in output.read_text()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert main(["launch", f"--cluster={output}", "--dry-run", "--", "train"]) == 0
