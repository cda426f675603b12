"""Starts processes for a measurement, by the launcher that an engine needs; each line of JSON that they print is a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "mpi": ("mpi", {}),
    **{f"zero-{stage}": ("deepspeed", {"stage": stage}) for stage in range(4)},
    **{f"{name} {way}": (name, {"overlap": way}) for name in ("ddp", "mpi") for way in ("segments:3", "sums:2")},
}
"""name of a column → (engine, its options)."""
LAUNCHES = (
    ("ddp", "ddp segments:3", "ddp sums:2", "fsdp"),
    ("zero-0", "zero-1", "zero-2", "zero-3"),
    ("mpi", "mpi segments:3", "mpi sums:2"),
)
"""Engines that share a launch."""


def results_of(rank: int, world_size: int, work: Callable[..., Iterable[Any]], *arguments: Any) -> list[Any]:
    """What a worker yields, for `run_ranks`: its ranks start much sooner than a launcher's."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    return list(work(*arguments))


def launch(columns: tuple[str, ...], ranks: int, module: str, *arguments: str) -> list[dict[str, Any]]:
    """Runs `python -m module --worker columns… arguments…` in every process on this machine; the results, in order.

    Raises:
        RuntimeError: a process failed; with what it said.
    """
    work = ["-m", module, "--worker", *columns, *arguments]
    if columns[0].startswith("mpi"):
        mpirun = [str(Path(sys.executable).with_name("mpirun")), "-launcher", "fork", "-n", str(ranks)]
        command = [*mpirun, sys.executable, *work]
    else:
        options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]
