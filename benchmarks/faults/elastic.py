"""Ranks that join and leave under torchrun's elastic mode, on emulated hosts: two, then three, then four, then three.

    sudo python -m benchmarks.faults.elastic [--budgets 10% null] [--repetitions 3]

Measures the seconds from a host's start (or death) to the first forward of the new set of ranks, shared and dense, and the steps
that are repeated. Hosts share the disk with the checkpoints. Writes results/elastic/.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.fault_lab import environment_of, lost, sentences
from benchmarks.result_files import ResultFile
from dist_ssn.cluster import load_cluster
from dist_ssn.lab import Lab, plan_network
from dist_ssn.lab.hosts import end_processes, this_owner
from dist_ssn.train.checkpoint.folder import latest

PORT = 29_622
LIMIT_SECONDS = 180
TO_CHECKPOINT_SECONDS = 4.0  # from one to the next, on a link of 100 Mbit/s
SETTINGS = {
    **{
        "name": "run",
        "model": "benchmarks.faults.fault_model.build",
        "optimizer.lr": 1e-3,
        "schedule.name": "constant",
    },
    **{"data.limit": 400_000, "batch_size": 12, "steps": 10**6, "evaluate_every": 10**6, "evaluate_batches": 1},
    **{"checkpoint.every": 20, "checkpoint.resume": "true", "engine.timeout_seconds": 60},
}
MODEL = '{"layers": 4, "width": 256, "heads": 4, "context": 32}'


class Elastic:
    """A job in the lab, one torchrun per host."""

    def __init__(self, lab: Lab, folder: Path, budget: str, dice: random.Random) -> None:
        self.lab, self.folder, self.mark, self.dice = lab, folder, folder / "mark", dice
        address = lab.network.hosts[0].address
        elastic = [
            "--nnodes=2:4",
            "--nproc-per-node=1",
            "--max-restarts=10",
            "--rdzv-backend=c10d",
            "--rdzv-id=elastic",
        ]
        elastic += [f"--rdzv-endpoint={address}:{PORT}", "--rdzv-conf=last_call_timeout=3,is_host={}"]
        program = [f"--output={folder}", f"--share.budget={budget}", f"--model_args={MODEL}", "--no-progress"]
        program += [f"--{key}={value}" for key, value in SETTINGS.items()]
        self.command = ["torchrun", *elastic], ["-m", "dist_ssn.cli", "train", *program]
        self.hosts: dict[int, subprocess.Popen[bytes]] = {}

    def join(self, host: int) -> None:
        """Starts a host's torchrun."""
        launcher, program = self.command
        there = self.lab.network.hosts[host].address
        variables = {"FAULT": "mark 0 1", "FAULT_MARK": str(self.mark), "GLOO_SOCKET_IFNAME": self.lab.network.device}
        # Without it, a joining node waits for an address that was given in an earlier round only (torch 2.13).
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with (self.folder / f"host-{host}.log").open("wb") as log:
            # Else torchrun guesses by names, which all hosts share here.
            argv = [*(word.replace("{}", str(int(host == 0))) for word in launcher), f"--local-addr={there}", *program]
            self.hosts[host] = self.lab.start(host, argv, environment_of(variables), log)

    def leave(self, host: int) -> None:
        """Kills a host, with all that runs there."""
        launcher = psutil.Process(self.hosts.pop(host).pid)
        for process in (launcher, *launcher.children(recursive=True)):
            process.kill()

    def after(self, change: Callable[[], None]) -> dict[str, Any]:
        """Changes the set of ranks, and waits for the first forward of the new set and for its first checkpoint."""
        self.mark.unlink(missing_ok=True)
        known = {host: len(sentences(self.folder / f"host-{host}.log")) for host in self.hosts}
        time.sleep(self.dice.uniform(0, TO_CHECKPOINT_SECONDS))  # not always just after a checkpoint
        began = time.time()
        change()
        self._until(self.mark.exists)
        seconds = float(self.mark.read_text()) - began
        newest = latest(self.folder / "run" / "checkpoints")
        self._until(lambda: latest(self.folder / "run" / "checkpoints") != newest)
        said = [line for host, count in known.items() for line in sentences(self.folder / f"host-{host}.log")[count:]]
        return {"seconds": seconds, "said": [line.replace(str(self.folder), "runs") for line in said]}

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.time() + LIMIT_SECONDS
        while not condition():
            if time.time() > deadline or any(process.poll() is not None for process in self.hosts.values()):
                logs = "\n".join((self.folder / f"host-{host}.log").read_text()[-2000:] for host in self.hosts)
                raise SystemExit(f"the job does not go on:\n{logs}")
            time.sleep(0.05)


def measure(budget: str, dice: random.Random) -> list[dict[str, Any]]:
    """Runs one job and measures the cost of each change of its ranks."""
    found = []
    with (
        tempfile.TemporaryDirectory() as name,
        Lab(plan_network(load_cluster("emulated-100mbit"), this_owner())) as lab,
    ):
        job = Elastic(lab, Path(name), budget, dice)

        def begin() -> None:
            job.join(0)
            job.join(1)

        changes = {"2 begin": begin, "2 → 3": lambda: job.join(2), "3 → 4": lambda: job.join(3)}
        changes["4 → 3"] = lambda: job.leave(3)
        for change, make in changes.items():
            line = {"budget": budget, "change": change, **job.after(make)}
            line["steps_lost"] = lost(line["said"])
            found.append(line)
            print({key: line[key] for key in ("budget", "change", "seconds", "steps_lost")}, flush=True)
        state = json.loads((latest(Path(name) / "run" / "checkpoints") or Path()).joinpath("state.json").read_text())
        end_processes(lab.network.namespaces)
    size = sum(state["files"][name]["bytes"] for name in ("model.safetensors", "optimizer.safetensors"))
    return [{**line, "state_bytes": size} for line in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["10%", "null"])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    results = ResultFile("elastic")
    for repetition in range(arguments.repetitions):
        for budget in arguments.budgets:
            for line in measure(budget, random.Random(repetition)):
                results.add({**line, "repetition": repetition})


if __name__ == "__main__":
    main()
