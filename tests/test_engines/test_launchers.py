"""torchrun, DeepSpeed's launcher and mpirun start the command line, and leave no process behind, whatever ends the job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
SECONDS = 30  # in which a job must be gone
RECIPE = """
name: run
model: gpt
model_args: {layers: 1, width: 16, heads: 2, context: 16}
data: {name: text}
share: {budget: 20%}
optimizer: {name: adamw, lr: 1.0e-3}
steps: 1000000
batch_size: 4
evaluate_every: 5
evaluate_batches: 1
"""
BIN = Path(sys.executable).parent
LAUNCHERS: dict[str, tuple[str, int, list[str]]] = {
    "torchrun": (
        "fsdp",
        2,
        [str(BIN / "torchrun"), "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m", "dist_ssn.cli"],
    ),
    "deepspeed": (
        "deepspeed",
        2,
        [str(BIN / "deepspeed"), "--num_gpus=2", "--master_port={port}", "--no_local_rank", "--module", "dist_ssn.cli"],
    ),
    "mpirun": ("mpi", 4, [str(BIN / "mpirun"), "-launcher", "fork", "-n", "4", sys.executable, "-m", "dist_ssn.cli"]),
}


def processes(folder: Path) -> dict[int, int]:
    """Process → its parent, of all that have `folder` on their command line."""
    listed = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    found = (line.split(maxsplit=2) for line in listed.splitlines() if f"--output={folder} " in line)
    return {int(pid): int(parent) for pid, parent, _ in found}


def trainers(folder: Path, launcher: int) -> list[int]:
    """Those that are not the launcher, nor a helper of its."""
    found = processes(folder)
    return sorted(found.keys() - set(found.values()) - {launcher})


def until(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("how", ["Ctrl-C", "dead rank"])
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_job_ends_whole(launcher: str, how: str, tmp_path: Path) -> None:
    engine, ranks, start = LAUNCHERS[launcher]
    if not Path(start[0]).exists():
        pytest.skip(f"{launcher} is not installed: pip install 'dist_ssn[all]'")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    settings = ["train", "--config", str(tmp_path / "recipe.yaml"), f"--output={tmp_path}", f"--engine.name={engine}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        start = [part.format(port=free.getsockname()[1]) for part in start]
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(
            [*start, *settings], env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert until(lambda: metrics.exists() and metrics.read_text(), 120), (tmp_path / "said").read_text()
        pids = trainers(tmp_path, job.pid)
        assert len(pids) == ranks
        if how == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to the launcher and all that it has started
        else:
            os.kill(max(pids), signal.SIGKILL)
        assert until(lambda: job.poll() is not None and not processes(tmp_path), SECONDS), (
            tmp_path / "said"
        ).read_text()
        assert job.returncode != 0
    finally:
        for pid in processes(tmp_path):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.wait(SECONDS)
