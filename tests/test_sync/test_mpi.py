"""Exchanges over mpi4py, under mpirun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_sync.test_exchange import ERROR

pytest.importorskip("mpi4py", reason="pip install 'dist_ssn[mpi]'")


@pytest.mark.distributed
def test_exchanges_over_mpi() -> None:
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    command = [mpirun, "-launcher", "fork", "-n", "2", sys.executable, "-m", "tests.test_sync.mpi_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert len(found["cells"]) == 14
    for what, cell in found["cells"].items():
        assert cell.pop("error") <= ERROR[what.split()[0]], what
        assert set(cell.values()) == {True}, (what, cell)
    assert "rank 0 has 10 values" in found["differ"] and "rank 1 has 11 values" in found["differ"]
