"""Trains on four emulated hosts for hours, with a random fault every few minutes; then the same steps undisturbed.

    sudo python -m benchmarks.faults.soak [--minutes 120] [--every 180] [--seed 0]

As a scheduler does, it restarts a job that has ended, with SLURM_RESTART_COUNT, and the job continues by itself.
Writes results/soak/: a line per fault, and one of the whole: whether losses, parameters and optimizer state are bit for bit those
of the undisturbed run, and how memory and open files of each process grew. The link is slow, so that the steps wait for it and
not for this machine's processors, which four ranks share.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.fault_lab import link, result_of, sentences, signal_all, start_on
from benchmarks.faults.run import ENGINES, SETTINGS
from benchmarks.result_files import ResultFile
from dist_ssn.cluster import load_cluster
from dist_ssn.lab import Lab, plan_network
from dist_ssn.lab.hosts import end_processes, this_owner
from dist_ssn.train.checkpoint.folder import latest

MBIT = 20.0
SAMPLE_SECONDS = 5.0
WARM_SECONDS = 30.0  # of a process's life, in which it may grow
LONGEST_SECONDS = (
    180.0  # from a fault to the job's end, and from a start to its next checkpoint; what takes longer hangs
)
LONG_RUN = {"evaluate_every": 500, "checkpoint.every": 100, "checkpoint.keep": 3, "schedule.name": "constant"}


class Job:
    """A run on the lab's hosts that is started, disturbed, watched and restarted."""

    def __init__(self, folder: Path, steps: int, engine: str, mbit: float = MBIT) -> None:
        cluster = load_cluster("emulated-100mbit")
        self.cluster = dataclasses.replace(cluster, between=dataclasses.replace(cluster.between, bandwidth_mbit=mbit))
        self.lab = Lab(plan_network(self.cluster, this_owner()))
        self.folder, self.starts = folder, 0
        settings = {**SETTINGS, **LONG_RUN, "steps": steps}
        self.program = ["train", "--no-progress", f"--output={folder}"]
        self.program += [*(f"--{key}={value}" for key, value in settings.items()), *ENGINES[engine]]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.samples: dict[psutil.Process, list[tuple[float, int, int]]] = {}

    def start(self, *more: str) -> None:
        """Starts the job, or restarts it after its end."""
        end_processes(self.lab.network.namespaces)
        variables = {"FAULT": "none 0 0", "FAULT_MARK": str(self.folder / "mark")}
        variables |= {"SLURM_RESTART_COUNT": str(self.starts)}
        self.starts += 1
        self.logs = [self.folder / f"host-{host}-{self.starts}.log" for host in range(len(self.lab.network.hosts))]
        self.processes = start_on(self.lab, self.cluster, [*self.program, *more], self.folder, self.logs, variables)

    def runs(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def workers(self) -> list[psutil.Process]:
        """The training processes: torchrun's children, by host."""
        found = []
        for process in self.processes:
            try:
                found += psutil.Process(process.pid).children()
            except psutil.NoSuchProcess:
                continue
        return found

    def sample(self) -> None:
        """Memory and open files of each training process, with its age."""
        for worker in self.workers():
            try:
                row = (time.time() - worker.create_time(), worker.memory_info().rss, worker.num_fds())
            except psutil.Error:
                continue
            self.samples.setdefault(worker, []).append(row)

    def watch(self, seconds: float) -> bool:
        """Takes samples for a given time or until the job ends. Returns whether it still runs."""
        end = time.time() + seconds
        while time.time() < end and self.runs():
            self.sample()
            time.sleep(min(SAMPLE_SECONDS, max(0.0, end - time.time())))
        return self.runs()

    def step(self) -> int:
        """Step of the newest checkpoint."""
        found = latest(self.folder / "run" / "checkpoints")
        return int(found.name.removeprefix("step-")) if found is not None else 0


# ---------------------------------------------------------------- faults, on a host chosen by chance


def _children(job: Job, host: int) -> list[psutil.Process]:
    return psutil.Process(job.processes[host].pid).children()


def _signal_worker(number: signal.Signals) -> Callable[[Job, int], None]:
    def act(job: Job, host: int) -> None:
        for worker in _children(job, host):
            worker.send_signal(number)

    return act


def _stop_for(seconds: float) -> Callable[[Job, int], None]:
    def act(job: Job, host: int) -> None:
        stopped = _children(job, host)
        for worker in stopped:
            worker.suspend()
        job.watch(seconds)
        for worker in stopped:
            if worker.is_running():
                worker.resume()

    return act


def _link_down_for(seconds: float) -> Callable[[Job, int], None]:
    def act(job: Job, host: int) -> None:
        link(job.lab, host, up=False)
        job.watch(seconds)
        link(job.lab, host, up=True)

    return act


def _kill_host(job: Job, host: int) -> None:
    launcher = psutil.Process(job.processes[host].pid)
    for process in (launcher, *launcher.children(recursive=True)):
        process.kill()


def _terminate_all(job: Job, _: int) -> None:
    signal_all(job.processes, signal.SIGTERM)


def _truncate(job: Job, host: int) -> None:
    """Truncates the newest checkpoint while no process runs; the one before stays whole."""
    _kill_host(job, host)
    job.watch(LONGEST_SECONDS)
    newest = latest(job.folder / "run" / "checkpoints")
    if newest is not None and job.step() > int(LONG_RUN["checkpoint.every"]):
        os.truncate(newest / "optimizer.safetensors", 1000)


FAULTS: dict[str, Callable[[Job, int], None]] = {
    "SIGKILL of a rank": _signal_worker(signal.SIGKILL),
    "SIGTERM to a rank": _signal_worker(signal.SIGTERM),
    "SIGSTOP for 5 s": _stop_for(5),
    "SIGSTOP for 60 s": _stop_for(60),
    "link down 5 s": _link_down_for(5),
    "link down 60 s": _link_down_for(60),
    "host killed": _kill_host,
    "SIGTERM to all": _terminate_all,
    "host killed, checkpoint truncated": _truncate,
}


def disturb(job: Job, name: str, host: int) -> dict[str, Any]:
    """Causes one fault and runs the job to its next checkpoint, with a restart if it has ended."""
    before, began = job.step(), time.time()
    FAULTS[name](job, host)
    hung = not _until(lambda: not job.runs() or job.step() > before, job)
    said = sorted({line for log in job.logs for line in sentences(log)})
    if hung:
        end_processes(job.lab.network.namespaces)
    ended = not job.runs()
    if ended:
        job.start()
        hung |= not _until(lambda: job.step() > before, job)
    line = {"fault": name, "host": host, "step": before, "seconds": time.time() - began, "hang": hung, "ended": ended}
    return {**line, "said": [sentence.replace(str(job.folder), "runs") for sentence in said]}


def _until(condition: Callable[[], bool], job: Job) -> bool:
    deadline = time.time() + LONGEST_SECONDS
    while not condition() and time.time() < deadline:
        job.watch(SAMPLE_SECONDS / 5)
        time.sleep(0.1)
    return condition()


# ---------------------------------------------------------------- what came of it


def growth(job: Job) -> dict[str, Any]:
    """Growth of memory and open files from warm-up to end, of the processes that lived long enough."""
    memory, files, alive, first = [], [], [], []
    for rows in job.samples.values():
        warm = [(age, rss, fds) for age, rss, fds in rows if age > WARM_SECONDS]
        if len(warm) < 3:
            continue
        alive.append(warm[-1][0])
        first.append(warm[0])
        memory.append((warm[-1][1] - warm[0][1]) / 2**20)
        files.append(warm[-1][2] - warm[0][2])
    return {
        "processes": len(memory),
        "longest_life_s": max(alive),
        "memory_growth_mib": {"median": statistics.median(memory), "max": max(memory)},
        "open_files_growth": {"median": statistics.median(files), "max": max(files)},
        "memory_mib_of_first_and_last_process": [first[0][1] / 2**20, first[-1][1] / 2**20],
        "open_files_of_first_and_last_process": [first[0][2], first[-1][2]],
    }


def finish(job: Job, steps: int) -> dict[str, Any] | None:
    """Ends the run at its present step, as a run with this number of steps ends."""
    job.start(f"--steps={steps}", "--checkpoint.resume=true")
    job.watch(600)
    return result_of(job.folder / "run")


def soak(minutes: float, every: float, seed: int, engine: str, results: ResultFile) -> dict[str, Any]:
    dice = random.Random(seed)
    faults: list[dict[str, Any]] = []
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        job = Job(Path(name), 10**7, engine)
        with job.lab:
            job.start()
            while time.time() - began < 60 * minutes:
                if not job.watch(min(dice.expovariate(1 / every), began + 60 * minutes - time.time())):
                    job.start()
                    continue
                if time.time() - began < 60 * minutes:
                    faults.append(disturb(job, dice.choice(list(FAULTS)), dice.randrange(len(job.processes))))
                    faults[-1] |= {"at_s": time.time() - began, "seed": seed, "engine": engine}
                    results.add(faults[-1])
                    print(
                        {key: faults[-1][key] for key in ("at_s", "fault", "host", "step", "hang", "ended")}, flush=True
                    )
            signal_all(job.processes, signal.SIGTERM)
            job.watch(LONGEST_SECONDS)
            steps, seconds, starts = job.step(), time.time() - began, job.starts
            result = finish(job, steps)
            bytes_left = sum(file.stat().st_size for file in (job.folder / "run").rglob("*") if file.is_file())
        print(f"{steps} steps in {seconds:.0f} s; now the same undisturbed", flush=True)
        shutil.rmtree(job.folder / "run")
        quiet = Job(Path(name), steps, engine, mbit=10_000)
        with quiet.lab:
            quiet.start()
            quiet.watch(3 * seconds)
            reference = result_of(quiet.folder / "run")
    if result is None or reference is None:
        raise SystemExit(
            f"a run has not ended: {[line for log in (*job.logs, *quiet.logs) for line in sentences(log)]}"
        )
    return {
        **{"what": "whole", "seed": seed, "engine": engine, "ranks": len(job.processes), "mbit": MBIT},
        **{"seconds": seconds, "steps": steps, "starts": starts, "faults": len(faults)},
        "hangs": sum(fault["hang"] for fault in faults),
        "equal": result == reference,
        "loss": result["losses"][-1],
        "loss_undisturbed": reference["losses"][-1],
        "bytes_left": bytes_left,
        **growth(job),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=180, metavar="SECONDS", help="between faults, as a mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    arguments = parser.parse_args()
    results = ResultFile("soak")
    print(f"seed {arguments.seed}")
    line = soak(arguments.minutes, arguments.every, arguments.seed, arguments.engine, results)
    results.add(line)
    print(line)
    return 0 if line["equal"] and not line["hangs"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
