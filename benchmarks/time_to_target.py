"""How long it takes to come to the loss at which dense training ends, on four hosts, by bandwidth.

    sudo python -m benchmarks.time_to_target curves steps [--task gpt-wide] [--mbit 100 1000 10000] [--repetitions 5]
    python -m benchmarks.time_to_target --table

A synchronous method's loss by step does not depend on the network. So time is steps times seconds per step: the steps are those
of the shortest run whose mean final loss is not above dense's with the same seeds (`benchmarks.quality target target-confirm`; runs
that send something else than gradients in fp32 are made here, by "curves", on two processes), and a step is measured in the lab
("steps"), all sides in turn. Four ranks share this machine's processors, which is hard on the sides that send little. Writes
results/time_to_target/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dist_ssn.cluster import load_cluster

from .quality import EQUAL, SEEDS, TARGETS, TASKS
from .results import ResultFile, chosen, lines_of

Line = dict[str, Any]
Runs = dict[str, dict[int, dict[int, float]]]
"""side → steps of the run → seed → final loss, at the side's best rate."""
WARM_UP, STEPS = 10, 30
FP16, POWERSGD, SMALL = "dense, fp16", "dense, PowerSGD rank 2", "dense, as small as 10 %"
OWN = {FP16: "dense", POWERSGD: "dense", "10%, fp16": "10%", "5%, fp16": "5%"}
"""Sides with curves of their own → the side in fp32 whose steps and best rate they take."""


def sides(task: str) -> dict[str, list[str]]:
    """name → what its recipe says; every budget of `quality.TARGETS`."""
    fp16 = ["--engine.compress=fp16"]
    budgets = {f"{side:.0%}": [f"--share.budget={side}"] for side in TARGETS[task] if isinstance(side, float)}
    return {
        "dense": [],
        FP16: fp16,
        POWERSGD: [],
        SMALL: [f"--model_args={json.dumps(EQUAL[task])}"],
        **budgets,
        **{f"{budget:.0%}, fp16": [f"--share.budget={budget}", *fp16] for budget in (0.1, 0.05)},
    }


def program(task: str, side: str, steps: int, folder: str, more: Iterable[str]) -> list[str]:
    """A command line of training, for a launcher."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in TASKS[task].items()}
    texts |= {"name": "run", "steps": str(steps), "output": folder, "threads": "1"}
    return ["train", "--no-progress", *(f"--{key}={value}" for key, value in texts.items()), *sides(task)[side], *more]


def script(side: str) -> list[str]:
    return [str(Path(__file__).with_name("powersgd.py"))] if side == POWERSGD else []


def curve(task: str, side: str, steps: int, rate: float, seed: int) -> Line:
    """A whole run on two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        more = [f"--optimizer.lr={rate}", f"--seed={seed}", *([f"--share.seed={seed}"] if "%" in side else [])]
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        target = script(side) or ["-m", "dist_ssn.cli"]
        command = [sys.executable, *launch, *target, *program(task, side, steps, folder, more)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        row = json.loads((Path(folder) / "run" / "summary.json").read_text())["rows"][0]
    cell = {"what": "curve", "task": task, "side": side, "seed": seed, "steps": steps, "rate": rate}
    return {**cell, "validation_loss": row["validation_loss"]}


def step(task: str, side: str, mbit: float) -> Line:
    """Milliseconds per step on four emulated hosts."""
    cluster = load_cluster("emulated-100mbit")
    facts = {
        key: value for key, value in dataclasses.asdict(cluster).items() if value and key not in ("name", "within")
    }
    facts["between"] = {"latency_us": cluster.between.latency_us, "bandwidth_mbit": mbit}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster.yaml").write_text(yaml.safe_dump(facts))
        lab = ["-m", "dist_ssn.cli", "lab", "run", f"--cluster={folder}/cluster.yaml", f"--logs={folder}/logs", "--"]
        more = [f"--evaluate_every={WARM_UP}", "--evaluate_batches=1", "--schedule.warmup=1"]
        command = [sys.executable, *lab, *script(side), *program(task, side, WARM_UP + STEPS, folder, more)]
        subprocess.run(command, check=True, capture_output=True)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    (row,) = summary["rows"]
    kept = ("ms_per_step", "bytes_per_step_logical", "bytes_per_step_ring", "parameters")
    cell = {"what": "step", "task": task, "side": side, "mbit": mbit, "hosts": cluster.nodes}
    return {**cell, **{key: row[key] for key in kept}}


def side_of(line: Line) -> str:
    """The name of what a line of `benchmarks.quality` measured."""
    budget = line["overrides"].get("share.budget")
    return f"{budget:.0%}" if budget else SMALL if line["kind"] == "equal" else str(line["kind"])


def final_losses(task: str, quality: Iterable[Line], own: Iterable[Line]) -> tuple[Runs, dict[str, float]]:
    """The losses of all runs, and the best rate of each side's first seed at its longest run."""
    found: dict[str, dict[int, dict[int, dict[float, float]]]] = {}
    for line in quality:
        if line["suite"] not in ("target", "target-confirm") or line["task"] != task:
            continue
        overrides = line["overrides"]
        rates = found.setdefault(side_of(line), {}).setdefault(overrides["steps"], {}).setdefault(line["seed"], {})
        rates[overrides["optimizer.lr"]] = line["validation_loss"]
    for line in own:
        if line["what"] == "curve" and line["task"] == task:
            runs = found.setdefault(line["side"], {}).setdefault(line["steps"], {})
            runs.setdefault(line["seed"], {})[line["rate"]] = line["validation_loss"]
    losses = {
        side: {steps: {seed: min(rates.values()) for seed, rates in seeds.items()} for steps, seeds in runs.items()}
        for side, runs in found.items()
    }
    best = {}
    for side, runs in found.items():
        rates = runs[max(runs)].get(SEEDS[0], {})
        if rates:
            best[side] = min(rates, key=lambda rate: rates[rate])
    return losses, best


def steps_to(dense: dict[int, float], runs: dict[int, dict[int, float]]) -> int | None:
    """Steps of the shortest run whose mean loss is not above dense's, seeds alike."""
    for steps, seeds in sorted(runs.items()):
        if statistics.mean(seeds.values()) <= statistics.mean(dense[seed] for seed in seeds):
            return steps
    return None


def table(task: str, losses: Runs, lines: Iterable[Line]) -> Table:
    """Steps and time to dense's final loss, side by side."""
    measured = [line for line in lines if line["what"] == "step" and line["task"] == task]
    bandwidths = sorted({line["mbit"] for line in measured})
    columns = ["side", "sent per step, kB (ring)", "steps to the target", "final loss there: mean (seeds)"]
    shown = Table(*columns, *(f"at {mbit:g} Mbit/s: ms per step; time; dense / this" for mbit in bandwidths))
    length = TASKS[task]["steps"]
    dense = losses["dense"][length]
    for side in sides(task):
        mine, runs = [line for line in measured if line["side"] == side], losses.get(side, {})
        if not mine or not runs:
            continue
        reached = steps_to(dense, runs)
        steps = reached or max(runs)
        values = list(runs[steps].values())
        seeds = ", ".join(f"{value:.3f}" for value in values)
        row = [side, f"{mine[0]['bytes_per_step_ring'] / 1000:,.0f}", f"{steps:,}" if reached else f"not in {steps:,}"]
        row.append(f"{statistics.mean(values):.3f} ({seeds})")
        for mbit in bandwidths:
            all_ms = [line["ms_per_step"] for line in mine if line["mbit"] == mbit]
            theirs = [line["ms_per_step"] for line in measured if (line["side"], line["mbit"]) == ("dense", mbit)]
            took = statistics.median(all_ms) * steps / 1000
            spread = f"{statistics.median(all_ms):.0f} ({min(all_ms):.0f}-{max(all_ms):.0f})"
            ratio = statistics.median(theirs) * length / 1000 / took
            row.append(f"{spread}; {took:,.0f} s; {ratio:.1f}" if reached else f"{spread}; never")
        shown.add_row(*row)
    return shown


def made(task: str) -> Table:
    """The table of everything measured so far."""
    lines = lines_of("time_to_target")
    return table(task, final_losses(task, lines_of("quality"), lines)[0], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="curves|steps", help="what to measure")
    parser.add_argument("--task", choices=TARGETS, default="gpt-wide")
    parser.add_argument("--mbit", nargs="+", type=float, default=[100, 1000, 10_000])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sides", nargs="*", default=[], help="only these are timed; all unless given")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the curves")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    task: str = arguments.task
    chosen(parser, arguments.what, ["curves", "steps"])
    chosen(parser, arguments.sides, sides(task))
    results = ResultFile("time_to_target")
    if "curves" in arguments.what:
        losses, best = final_losses(task, lines_of("quality"), [])
        dense = losses["dense"][TASKS[task]["steps"]]
        lines = [line for line in results.lines() if line["what"] == "curve" and line["task"] == task]
        done = {(line["side"], line["seed"]) for line in lines}
        for seed in SEEDS[: arguments.seeds]:
            for side, twin in OWN.items():
                if (side, seed) not in done:
                    steps = steps_to(dense, losses[twin]) or max(losses[twin])
                    line = curve(task, side, steps, best[twin], seed)
                    results.add(line)
                    print(f"{side}, seed {seed}: {line['validation_loss']:.4f} after {steps} steps", flush=True)
    if "steps" in arguments.what:
        for repetition in range(arguments.repetitions):
            for mbit in arguments.mbit:
                for side in arguments.sides or sides(task):
                    line = step(task, side, mbit)
                    results.add({**line, "repetition": repetition})
                    print(f"{side}, {mbit:g} Mbit/s: {line['ms_per_step']:.0f} ms", flush=True)
    if arguments.table or not arguments.what:
        Console(width=200).print(made(task))


if __name__ == "__main__":
    main()
