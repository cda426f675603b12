"""Compares a job that Slurm requeues in the middle with the undisturbed job, on several numbers of nodes.

    python -m benchmarks.faults.requeue [--nodes 2 3] [--signal]

Needs sbatch and scontrol on the PATH, and nodes that run one process each; those of a Slurm on one machine meet at 127.0.0.1. With
--signal, the job first gets SIGUSR1, as with `#SBATCH --signal`, and is requeued after it has made room. Writes results/requeue/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.fault_lab import result_of
from benchmarks.result_files import ResultFile
from dist_ssn.train.checkpoint.folder import latest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
STEPS, EVERY = 1200, 100
SETTINGS = {
    **{"name": "run", "model": "gpt", "model_args": '{"layers": 2, "width": 64, "heads": 4, "context": 32}'},
    **{"data.limit": 400_000, "share.budget": "10%", "steps": STEPS, "batch_size": 24, "evaluate_every": 300},
    **{"evaluate_batches": 2, "checkpoint.every": EVERY, "engine.timeout_seconds": 60},
}
LIMIT_SECONDS = 900


def submit(nodes: int, folder: Path) -> str:
    """Submits a job and returns its number."""
    here = {"MASTER_ADDR": "127.0.0.1", "INTERFACE": "lo", "PROCESSES": "1", "OMP_NUM_THREADS": "1"}
    command = [
        "sbatch",
        "--parsable",
        f"--nodes={nodes}",
        "--signal=USR1@10",
        f"--output={folder}/job.log",
        str(SCRIPT),
    ]
    program = ["-m", "dist_ssn.cli", "train", "--no-progress", f"--output={folder}"]
    program += [f"--{key}={value}" for key, value in SETTINGS.items()]
    done = subprocess.run([*command, *program], env={**here, **os.environ}, check=True, capture_output=True, text=True)
    return done.stdout.strip().partition(";")[0]


def state(job: str) -> tuple[str, int]:
    """State of the job, and the number of restarts by Slurm."""
    shown = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout
    found = re.search(r"JobState=(\w+)", shown), re.search(r"Restarts=(\d+)", shown)
    assert found[0] and found[1]
    return found[0][1], int(found[1][1])


def until(job: str, states: tuple[str, ...], step: int | None, run: Path) -> None:
    """Waits for one of `states` and for a checkpoint of at least `step`."""
    deadline = time.time() + LIMIT_SECONDS
    while time.time() < deadline:
        there = latest(run / "checkpoints")
        made = int(there.name.removeprefix("step-")) if there is not None else 0
        if state(job)[0] in states and (step is None or made >= step):
            return
        time.sleep(0.5)
    raise SystemExit(
        f"job {job} is {state(job)} after {LIMIT_SECONDS} s: {(run.parent / 'job.log').read_text()[-3000:]}"
    )


def run(nodes: int, requeued: bool, signalled: bool = False) -> dict[str, Any]:
    """Runs the job to its end."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = submit(nodes, folder)
        began = time.time()
        if requeued:
            until(job, ("RUNNING",), STEPS // 3, folder / "run")
            if signalled:
                subprocess.run(["scancel", "--signal=USR1", "--full", job], check=True)
                time.sleep(5)
            subprocess.run(["scontrol", "requeue", job], check=True)
        until(job, ended, None, folder / "run")
        said = [
            line
            for line in (folder / "job.log").read_text().splitlines()
            if "goes on from" in line or "dist-ssn:" in line
        ]
        return {
            "state": state(job),
            "result": result_of(folder / "run"),
            "said": [line.replace(name, "runs") for line in dict.fromkeys(said)],
            "seconds": time.time() - began,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--signal", action="store_true", help="the job gets SIGUSR1 before it is requeued")
    arguments = parser.parse_args()
    results, all_equal = ResultFile("requeue"), True
    for nodes in arguments.nodes:
        quiet, again = run(nodes, False), run(nodes, True, arguments.signal)
        equal = quiet["result"] is not None and quiet["result"] == again["result"]
        line = {"nodes": nodes, "steps": STEPS, "signal": arguments.signal, "equal": equal}
        line |= {"undisturbed": quiet, "requeued": again}
        results.add(line)
        print({key: line[key] for key in ("nodes", "signal", "equal")}, again["state"], again["said"], flush=True)
        all_equal &= equal
    return 0 if all_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
