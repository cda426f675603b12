"""Runs of a recipe on the lab's hosts with a fault, and their outcome."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_ssn.cluster import Cluster
from dist_ssn.lab.hosts import Lab, end_processes
from dist_ssn.lab.run import DEFAULTS, host_commands
from dist_ssn.launch.run import found
from dist_ssn.train.checkpoint.folder import latest, size_and_hash

LIMIT_SECONDS = 150  # from a fault to the end of everything; what takes longer hangs
PORT = 29_623
START_SECONDS = 400  # until the fault, and for a run without one: the start of four processes on a busy machine


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Args:
        codes: Exit codes of the hosts' launchers.
        said: One-sentence messages of the processes, in the order of the hosts.
        detected: Seconds from the fault to the first such message; None without a message.
        ended: Seconds from the fault to the end of the last process; None without a fault.
        hung: Whether the run had to be killed.
        seconds: Duration of the whole run.
    """

    codes: list[int]
    said: list[str]
    detected: float | None
    ended: float | None
    hung: bool
    seconds: float


def run_on(
    lab: Lab,
    cluster: Cluster,
    program: Sequence[str],
    folder: Path,
    fault: str,
    act: Callable[[Lab, list[subprocess.Popen[bytes]], float], bool] | None = None,
    variables: Mapping[str, str] | None = None,
    restarts: int = 0,
) -> Outcome:
    """Runs `dist-ssn PROGRAM` on all hosts.

    Args:
        fault: Kind, rank and step, as in `fault_model.py`.
        act: Called with the seconds since the fault, again and again, until it returns True; acts from outside.
        restarts: Number of times that torchrun itself starts the processes again.
    """
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    logs = [folder / f"host-{rank}.log" for rank in range(len(lab.network.hosts))]
    began = time.time()
    marked: float | None = None
    detected: float | None = None
    variables = {"FAULT": fault, "FAULT_MARK": str(mark), **(variables or {})}
    processes = start_on(lab, cluster, program, folder, logs, variables, restarts)
    hung = False
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if marked is None and mark.exists():
            marked = float(mark.read_text())
        if marked is not None and act is not None and act(lab, processes, time.time() - marked):
            act = None
        if detected is None and marked is not None and any(sentences(log) for log in logs):
            detected = time.time() - marked
        if time.time() > (began + START_SECONDS if marked is None else marked + LIMIT_SECONDS):
            hung = True
            end_processes(lab.network.namespaces)
    end = time.time()
    end_processes(lab.network.namespaces)
    said = [sentence for log in logs for sentence in sentences(log)]
    ended = None if marked is None else end - marked
    return Outcome([process.returncode for process in processes], said, detected, ended, hung, end - began)


def start_on(
    lab: Lab,
    cluster: Cluster,
    program: Sequence[str],
    folder: Path,
    logs: Sequence[Path],
    variables: Mapping[str, str],
    restarts: int = 0,
) -> list[subprocess.Popen[bytes]]:
    """Starts `dist-ssn PROGRAM` on all hosts, each with its log; arguments as in `run_on`."""
    environ = environment_of(variables)
    processes = []
    for rank, command in enumerate(host_commands(cluster, lab.network, program, folder)):
        if restarts:
            command = dataclasses.replace(command, argv=restarting(lab, rank, restarts, program))
        command = found(command, environ["PATH"])
        with logs[rank].open("wb") as log:
            processes.append(lab.start(rank, command.argv, {**environ, **command.environment}, log))
    return processes


def restarting(lab: Lab, host: int, restarts: int, program: Sequence[str]) -> tuple[str, ...]:
    """Command of one host: torchrun that finds the others again, and starts `dist-ssn PROGRAM` anew, when a process has died."""
    hosts = lab.network.hosts
    # By itself torchrun guesses by names, which all hosts share here, who has the store, and where it is itself.
    meeting = [
        f"--rdzv-endpoint={hosts[0].address}:{PORT}",
        "--rdzv-id=faults",
        f"--rdzv-conf=is_host={int(host == 0)}",
    ]
    group = [f"--nnodes={len(hosts)}", "--nproc-per-node=1", f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
    return ("torchrun", *group, *meeting, f"--local-addr={hosts[host].address}", "-m", "dist_ssn.cli", *program)


def environment_of(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment of this process with `variables`, and with this Python's programs first."""
    environ = {**DEFAULTS, **os.environ, **variables}
    return {**environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])}


def sentences(log: Path) -> list[str]:
    """Messages of dist-ssn itself in a log."""
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix("dist-ssn: ") for line in lines if line.startswith("dist-ssn: ")]


def lost(said: Sequence[str]) -> int | None:
    """Number of repeated steps, from the ranks' messages; None if there is no message."""
    named = [(re.search(r"after step (\d+)", line), re.search(r"checkpoints/step-(\d+)", line)) for line in said]
    made = [int(at[1]) - int(saved[1]) for at, saved in named if at and saved]
    return max(made, default=None)


def link(lab: Lab, host: int, up: bool) -> None:
    """Cuts a host's link, or restores it."""
    network = lab.network
    state = "up" if up else "down"
    subprocess.run(["ip", "-n", network.switch, "link", "set", network.hosts[host].port, state], check=True)


def signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Sends a signal to the launchers and all processes that they started, as a scheduler does."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mounts a small disk at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, spare: int) -> Path:
    """Fills the disk of `folder`, and leaves a given number of bytes free."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - spare)))
    return ballast


def last_checkpoint(run: Path) -> tuple[int, bool] | None:
    """Step of the newest checkpoint, and whether all its files are intact."""
    found = latest(run / "checkpoints")
    if found is None:
        return None
    state = json.loads((found / "state.json").read_text())
    return state["step"], all(size_and_hash(found / name) == expected for name, expected in state["files"].items())


def result_of(run: Path) -> dict[str, Any] | None:
    """Validation losses and last checkpoint of a run, for a comparison bit for bit; None if the run has not ended."""
    if not (run / "summary.json").exists():
        return None
    summary = json.loads((run / "summary.json").read_text())
    last = latest(run / "checkpoints")
    assert last is not None
    state = json.loads((last / "state.json").read_text())
    return {
        "steps": state["step"],
        "losses": [[point["step"], point["validation_loss"]] for point in summary["rows"][0]["history"]],
        "model": state["files"]["model.safetensors"]["sha256"],
        "optimizer": state["files"]["optimizer.safetensors"]["sha256"],
    }


TERM = signal.SIGTERM
