"""Causes each fault on four emulated hosts at 100 Mbit/s, under DDP and ZeRO-1, then starts the run again and compares.

    sudo python -m benchmarks.faults.run [--faults NAME ...] [--engines ddp zero-1 rounds] [--table]

"rounds" are local updates of ten steps under DDP's engine, with faults of their own.

Writes results/faults/, one line per fault and engine, and skips what this commit has measured already. --table: shows the measured
lines, and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.faults.fault_lab import (
    TERM,
    Outcome,
    fill,
    last_checkpoint,
    link,
    lost,
    result_of,
    run_on,
    signal_all,
    small_disk,
)
from benchmarks.result_files import ResultFile
from dist_ssn.cluster import load_cluster
from dist_ssn.lab import Lab, plan_network
from dist_ssn.lab.hosts import this_owner
from dist_ssn.train.checkpoint.folder import latest

STEPS, EVERY, AT, RANK = 30, 10, 25, 2
TIMEOUT_SECONDS = 20
ENGINES = {
    "ddp": ["--engine.name=ddp"],
    "zero-1": ["--engine.name=deepspeed", "--engine.stage=1"],
    "rounds": ["--engine.name=ddp", f"--sync.every={EVERY}", "--sync.codec=int4"],
}
EVERY_STEP = ("ddp", "zero-1")
SETTINGS = {
    "name": "run",
    "model": "benchmarks.faults.fault_model.build",
    "model_args": '{"layers": 2, "width": 64, "heads": 4, "context": 32}',
    "data.limit": 400_000,
    "share.budget": "50%",
    "optimizer.lr": 1e-3,
    "steps": STEPS,
    "batch_size": 8,
    "evaluate_every": EVERY,
    "evaluate_batches": 2,
    "checkpoint.every": EVERY,
    "engine.compare_every": 1,
    "engine.timeout_seconds": TIMEOUT_SECONDS,
}
UNDISTURBED = "none"
Act = Callable[[Lab, list[subprocess.Popen[bytes]], float], bool]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        kind: Kind in `fault_model.py`.
        act: Acts from outside once the fault is there.
        rank: Rank with the fault.
        at: Step of the fault.
        loss_percent: Packet loss of the links.
        disk_mb: Size of the disk for the run's folder; None: no limit.
        truncate: Whether the newest checkpoint is truncated before the restart.
        made: Number of steps made at detection, if no message says it.
        restarts: Number of times that torchrun starts the run again by itself; 0: the driver does.
        engines: Engines that have this fault.
    """

    kind: str
    act: Act | None = None
    rank: int = RANK
    at: int = AT
    loss_percent: float = 0.0
    disk_mb: int | None = None
    truncate: bool = False
    made: int | None = None
    restarts: int = 0
    engines: tuple[str, ...] = EVERY_STEP


def _link_down(seconds: float | None) -> Act:
    def act(lab: Lab, processes: list[subprocess.Popen[bytes]], since: float) -> bool:
        link(lab, RANK, up=seconds is not None and since >= seconds)
        return seconds is None or since >= seconds

    return act


def _signal_all(lab: Lab, processes: list[subprocess.Popen[bytes]], since: float) -> bool:
    signal_all(processes, TERM)
    return True


def _fill_disk(folder: Path) -> Act:
    def act(lab: Lab, processes: list[subprocess.Popen[bytes]], since: float) -> bool:
        fill(folder, spare=100_000)  # for logs and metrics
        return True

    return act


FAULTS: dict[str, Fault] = {
    "SIGKILL in forward": Fault("kill-in-forward"),
    "SIGKILL in all-reduce": Fault("kill-in-all-reduce"),
    "SIGKILL while saving": Fault("kill-while-saving", rank=0, at=EVERY + 5),
    "SIGSTOP for 60 s": Fault("stop"),
    "link down 10 s": Fault("mark", _link_down(10)),
    "link down for good": Fault("mark", _link_down(None)),
    "5 % packet loss": Fault("mark", loss_percent=5),
    "disk full while saving": Fault("mark", disk_mb=8, made=STEPS),
    "checkpoint truncated": Fault("kill-in-forward", truncate=True),
    "NaN on one rank": Fault("nan", made=STEPS),
    "one bank bit flipped": Fault("flip"),
    "SIGTERM to all": Fault("mark", _signal_all, at=EVERY + 5),
    "SIGKILL in a round": Fault("kill-in-forward", restarts=1, engines=("rounds",)),
    "SIGSTOP for a round, 10 s": Fault("pause", engines=("rounds",)),
    "NaN in a round": Fault("nan", at=EVERY + 5, made=STEPS, engines=("rounds",)),
}


def program(engine: str, output: Path, resume: bool = False) -> list[str]:
    """Command line that trains under one engine."""
    settings = [f"--{key}={value}" for key, value in SETTINGS.items()] + ENGINES[engine]
    going_on = ["--checkpoint.resume=true"] if resume else []
    return ["train", "--no-progress", f"--output={output}", *settings, *going_on]


@contextmanager
def lab_of(loss_percent: float) -> Iterator[tuple[Lab, Any]]:
    cluster = dataclasses.replace(load_cluster("emulated-100mbit"), loss_percent=loss_percent)
    with Lab(plan_network(cluster, this_owner())) as lab:
        yield lab, cluster


def measure(engine: str, fault: Fault, reference: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Causes the fault, starts the run again, and compares it with the undisturbed run."""
    run = folder / "run"
    with lab_of(fault.loss_percent) as (lab, cluster):
        act = fault.act if fault.disk_mb is None else _fill_disk(folder)
        cause = f"{fault.kind} {fault.rank} {fault.at}"
        outcome = run_on(lab, cluster, program(engine, folder), folder, cause, act, restarts=fault.restarts)
        if outcome.ended is None:
            raise SystemExit(f"{fault.kind} did not come: {outcome.said}")
        link(lab, RANK, up=True)
        (folder / "ballast").unlink(missing_ok=True)
        steps_made = fault.made or max(
            (int(step) for step in re.findall(r"after step (\d+)", " ".join(outcome.said))), default=fault.at - 1
        )
        variables: dict[str, str] = {}
        if fault.truncate:
            newest = latest(run / "checkpoints")
            assert newest is not None
            os.truncate(newest / "model.safetensors", (newest / "model.safetensors").stat().st_size // 2)
            variables = {"SLURM_RESTART_COUNT": "1"}  # as Slurm says of a job that it has started again
        found = last_checkpoint(run)
        again: Outcome | None = None
        if result_of(run) is None:
            again = run_on(
                lab, cluster, program(engine, folder, not fault.truncate), folder, "none 0 0", None, variables
            )
    result = result_of(run)
    said = [sentence.replace(str(folder), "runs") for sentence in outcome.said]
    log = (folder / "host-0.log").read_text()
    told = [
        line.replace(str(folder), "runs") for line in log.splitlines() if re.search(r"it is (skipped|left out)", line)
    ]
    steps_lost = lost(said) if fault.restarts else 0
    if again is not None and found is not None:
        steps_lost = steps_made - found[0]
    return {
        "detected_s": outcome.detected,
        "ended_s": outcome.ended,
        "exit_codes": outcome.codes,
        "said": told[0].partition("Warning: ")[2] or told[0] if told else (said[0] if said else None),
        "all_said": said,
        "steps_lost": steps_lost,
        "hang": outcome.hung or (again is not None and again.hung),
        "checkpoint_left": found[0] if found is not None else None,
        "checkpoint_whole": found is not None and found[1],
        "started_again": again is not None,
        "equal": result == reference,
        "differs": [key for key in reference if result is None or result[key] != reference[key]],
        "last_loss": None if result is None else result["losses"][-1][1],
        "undisturbed_last_loss": reference["losses"][-1][1],
        "left_out": left_out_of(run),
        "seconds": outcome.seconds + (again.seconds if again is not None else 0.0),
    }


def left_out_of(run: Path) -> list[list[Any]]:
    """Last step of each round that left somebody out, and who; of the last start of the run."""
    summary = run / "summary.json"
    rounds = json.loads(summary.read_text()).get("rounds", []) if summary.exists() else []
    return [[one["step"], one["left_out"]] for one in rounds if one["left_out"]]


def undisturbed(engine: str) -> dict[str, Any]:
    """Result of the same run without a fault."""
    with tempfile.TemporaryDirectory() as folder, lab_of(0) as (lab, cluster):
        quiet = run_on(lab, cluster, program(engine, Path(folder)), Path(folder), "none 0 0")
        result = result_of(Path(folder) / "run")
    if result is None:
        raise SystemExit(f"the undisturbed run under {engine} failed: {quiet.said or quiet.codes}")
    return {
        "fault": UNDISTURBED,
        "engine": engine,
        "ranks": 4,
        "steps": STEPS,
        "result": result,
        "seconds": quiet.seconds,
    }


def table(lines: list[dict[str, Any]]) -> Table:
    made = Table(
        "fault",
        "engine",
        "detected, s",
        "what the user sees",
        "steps lost",
        "hang",
        "good checkpoint left",
        "resumed = undisturbed",
    )
    for line in lines:
        goes_on = "it waits, and goes on" if not line["started_again"] else "the launcher's own report"
        seen = line["said"] or goes_on
        left = "-" if line["checkpoint_left"] is None else f"step {line['checkpoint_left']}"
        whole = "yes" if line["checkpoint_whole"] else "damaged, the one before is"
        made.add_row(
            line["fault"],
            line["engine"],
            "-" if line["detected_s"] is None else f"{line['detected_s']:.1f}",
            escape(seen),
            str(line["steps_lost"]),
            "YES" if line["hang"] else "no",
            f"{left}: {whole}",
            "yes" if line["equal"] else f"NO ({', '.join(line['differs'])})",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=FAULTS,
        default=list(FAULTS),
        metavar="NAME",
        help=", ".join(FAULTS).replace("%", "%%"),
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--table", action="store_true", help="show what was measured, and measure nothing")
    arguments = parser.parse_args()
    results = ResultFile("faults")
    known = {
        (line["fault"], line["engine"]): line
        for line in results.lines()
        if arguments.table or line["commit"] == results.provenance["commit"]
    }
    for engine in () if arguments.table else arguments.engines:
        mine = [name for name in arguments.faults if engine in FAULTS[name].engines]
        wanted = [name for name in mine if (name, engine) not in known]
        if not wanted:
            continue
        if (UNDISTURBED, engine) not in known:
            known[UNDISTURBED, engine] = undisturbed(engine)
            results.add(known[UNDISTURBED, engine])
        reference = known[UNDISTURBED, engine]["result"]
        for name in wanted:
            fault = FAULTS[name]
            with tempfile.TemporaryDirectory() as folder:
                if fault.disk_mb is None:
                    line = measure(engine, fault, reference, Path(folder))
                else:
                    with small_disk(Path(folder), fault.disk_mb):
                        line = measure(engine, fault, reference, Path(folder))
            line = {"fault": name, "engine": engine, "ranks": 4, "steps": STEPS, **line}
            results.add(line)
            known[name, engine] = line
            Console(width=200).print(table([line]))
    Console(width=200).print(
        table([known[key] for name in FAULTS for engine in ENGINES if (key := (name, engine)) in known])
    )


if __name__ == "__main__":
    main()
