"""The MPI engine under mpirun: orders that differ between ranks, pieces, missing gradients, and ranks that die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mpi4py", reason="pip install 'dist_ssn[mpi]'")
pytestmark = pytest.mark.distributed
MPIRUN = Path(sys.executable).with_name("mpirun")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
WORKER = "tests.test_engines.mpi_worker"


def mpirun(ranks: int, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    full = [str(MPIRUN), "-launcher", "fork", "-n", str(ranks), sys.executable, *command]
    return subprocess.run(full, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)


def scenarios(ranks: int, *names: str) -> dict[str, dict[str, Any]]:
    done = mpirun(ranks, "-m", WORKER, *names)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("scenario"): line for line in lines}


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_those_of_one_process_whatever_the_ranks_do(ranks: int) -> None:
    found = scenarios(ranks, "pieces", "order", "missing", "reentrant", "local", "keep", "world")
    assert found.pop("world") == {"rank": 0, "world_size": ranks, "local_rank": 0}
    local = found.pop("local")
    assert local["difference"] <= 1e-6 and local["gradients"] == 0
    keep = found.pop("keep")
    assert keep["difference"] <= 1e-12 and keep["sent"] == keep["trained"]
    assert keep["trained"] <= keep["start"] < keep["trained"] + 400 < keep["trained"] + keep["frozen"]
    assert keep["error"].startswith("rank 1 keeps other values of left.weight than rank 0 (1 of ")
    assert len(found) == 4
    for name, cell in found.items():
        assert cell["difference"] <= 1e-12, name
        assert cell["sent"] == cell["bytes"], name  # each trainable number once per step, and nothing else


@pytest.mark.parametrize(("how", "said"), [("crash", "rank 1 has had enough"), ("killed", "BAD TERMINATION")])
def test_a_dead_rank_ends_the_job_with_a_message(how: str, said: str) -> None:
    started = time.monotonic()
    done = mpirun(3, "-m", WORKER, how, timeout=60)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert time.monotonic() - started < 45  # its start takes half of that on a crowded machine
    assert f"-m {WORKER} {how}" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
