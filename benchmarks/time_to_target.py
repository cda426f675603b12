"""How long it takes to come to the loss at which dense training ends, on four hosts, by bandwidth.

    sudo python -m benchmarks.time_to_target curves steps [--mbit 100 1000 10000] [--repetitions 5]
    python -m benchmarks.time_to_target --table

A synchronous method's loss by step does not depend on the network. So time is steps times seconds per step: the steps are those
of the shortest run whose mean final loss over three seeds is not above dense's (`benchmarks.quality target target-confirm`; runs
that send 16-bit gradients are made here, by "curves", on two processes), and a step is measured in the lab ("steps"), all sides in
turn. Four ranks share this machine's processors, which is hard on the sides that send little. Writes results/time_to_target/.
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

from .quality import EQUAL, LENGTHS, SEEDS, TASKS
from .results import ResultFile, chosen, lines_of

Line = dict[str, Any]
WARM_UP, STEPS = 10, 30
FP16 = ["--engine.compress=fp16"]
SIDES: dict[str, list[str]] = {
    "dense": [],
    "dense, fp16": FP16,
    "dense, as small as 10 %": [f"--model_args={json.dumps(EQUAL['gpt'])}"],
    **{f"{budget:.0%}": [f"--share.budget={budget}"] for budget in LENGTHS},
    "10%, fp16": ["--share.budget=0.1", *FP16],
}
RATES = {"dense, fp16": 6e-3, "10%, fp16": 3e-3}
"""Of the sides with curves of their own: the best of the same side in fp32."""


def settings(steps: int, folder: str, more: Iterable[str]) -> list[str]:
    """A recipe: the GPT of `benchmarks.quality`."""
    task = {key: value if isinstance(value, str) else json.dumps(value) for key, value in TASKS["gpt"].items()}
    task |= {"name": "run", "steps": str(steps), "output": folder, "threads": "1"}
    return ["train", "--no-progress", *(f"--{key}={value}" for key, value in task.items()), *more]


def curve(side: str, seed: int) -> Line:
    """A whole run on two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        more = [*SIDES[side], f"--optimizer.lr={RATES[side]}", f"--seed={seed}"]
        more += [f"--share.seed={seed}"] if "budget" in str(SIDES[side]) else []
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        command = [sys.executable, *launch, "-m", "dist_ssn.cli", *settings(TASKS["gpt"]["steps"], folder, more)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        row = json.loads((Path(folder) / "run" / "summary.json").read_text())["rows"][0]
    return {
        **{"what": "curve", "side": side, "seed": seed, "steps": TASKS["gpt"]["steps"]},
        "validation_loss": row["validation_loss"],
    }


def step(side: str, mbit: float) -> Line:
    """Milliseconds per step on four emulated hosts."""
    cluster = load_cluster("emulated-100mbit")
    facts = {
        key: value for key, value in dataclasses.asdict(cluster).items() if value and key not in ("name", "within")
    }
    facts["between"] = {"latency_us": cluster.between.latency_us, "bandwidth_mbit": mbit}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster.yaml").write_text(yaml.safe_dump(facts))
        lab = ["-m", "dist_ssn.cli", "lab", "run", f"--cluster={folder}/cluster.yaml", f"--logs={folder}/logs", "--"]
        more = [*SIDES[side], f"--evaluate_every={WARM_UP}", "--evaluate_batches=1", "--schedule.warmup=1"]
        program = settings(WARM_UP + STEPS, folder, more)
        subprocess.run([sys.executable, *lab, *program], check=True, capture_output=True)
        row = json.loads((Path(folder) / "run" / "summary.json").read_text())["rows"][0]
    kept = ("ms_per_step", "bytes_per_step_logical", "bytes_per_step_ring", "parameters")
    return {"what": "step", "side": side, "mbit": mbit, "hosts": cluster.nodes, **{key: row[key] for key in kept}}


def final_losses(quality: Iterable[Line], own: Iterable[Line]) -> dict[str, dict[int, dict[int, float]]]:
    """side → steps of the run → seed → final loss, at the side's best rate."""
    found: dict[str, dict[int, dict[int, dict[float, float]]]] = {}
    for line in quality:
        if line["suite"] not in ("target", "target-confirm"):
            continue
        overrides = line["overrides"]
        budget = overrides.get("share.budget")
        side = f"{budget:.0%}" if budget else {"dense": "dense", "equal": "dense, as small as 10 %"}[line["kind"]]
        rates = found.setdefault(side, {}).setdefault(overrides["steps"], {}).setdefault(line["seed"], {})
        rates[overrides["optimizer.lr"]] = line["validation_loss"]
    losses = {
        side: {steps: {seed: min(rates.values()) for seed, rates in seeds.items()} for steps, seeds in runs.items()}
        for side, runs in found.items()
    }
    for line in own:
        if line["what"] == "curve":
            losses.setdefault(line["side"], {}).setdefault(line["steps"], {})[line["seed"]] = line["validation_loss"]
    return losses


def table(losses: dict[str, dict[int, dict[int, float]]], lines: list[Line]) -> Table:
    """Steps and time to dense's final loss, side by side."""
    bandwidths = sorted({line["mbit"] for line in lines if line["what"] == "step"})
    columns = ["side", "sent per step, kB (ring)", "steps to the target", "final loss there: mean (seeds)"]
    shown = Table(*columns, *(f"at {mbit:g} Mbit/s: ms per step, time, dense / this" for mbit in bandwidths))
    target = statistics.mean(losses["dense"][TASKS["gpt"]["steps"]].values())
    times: dict[tuple[str, float], float] = {}
    for side in SIDES:
        runs = {
            steps: list(seeds.values()) for steps, seeds in losses.get(side, {}).items() if len(seeds) == len(SEEDS)
        }
        reached = [steps for steps, values in sorted(runs.items()) if statistics.mean(values) <= target]
        steps = reached[0] if reached else max(runs, default=0)
        values = runs.get(steps, [])
        seeds = ", ".join(f"{value:.3f}" for value in values)
        mine = [line for line in lines if line["what"] == "step" and line["side"] == side]
        sent = f"{mine[0]['bytes_per_step_ring'] / 1000:,.0f}" if mine else ""
        row = [
            side,
            sent,
            str(steps) if reached else f"not in {steps}",
            f"{statistics.mean(values or [0]):.3f} ({seeds})",
        ]
        for mbit in bandwidths:
            all_ms = [line["ms_per_step"] for line in mine if line["mbit"] == mbit]
            if not all_ms:
                row.append("")
                continue
            times[side, mbit] = statistics.median(all_ms) * steps / 1000
            spread = f"{statistics.median(all_ms):.0f} ({min(all_ms):.0f}-{max(all_ms):.0f}) ms"
            ratio = times["dense", mbit] / times[side, mbit]
            row.append(f"{spread}, {times[side, mbit]:.0f} s, {ratio:.2f}" if reached else f"{spread}, never")
        shown.add_row(*row)
    return shown


def made() -> Table:
    """The table of everything measured so far."""
    lines = lines_of("time_to_target")
    return table(final_losses(lines_of("quality"), lines), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="curves|steps", help="what to measure")
    parser.add_argument("--mbit", nargs="+", type=float, default=[100, 1000, 10_000])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    chosen(parser, arguments.what, ["curves", "steps"])
    results = ResultFile("time_to_target")
    if "curves" in arguments.what:
        done = {(line["side"], line["seed"]) for line in results.lines() if line["what"] == "curve"}
        for seed in SEEDS:
            for side in RATES:
                if (side, seed) not in done:
                    results.add(curve(side, seed))
                    print(side, seed, flush=True)
    if "steps" in arguments.what:
        for repetition in range(arguments.repetitions):
            for mbit in arguments.mbit:
                for side in SIDES:
                    line = step(side, mbit)
                    results.add({**line, "repetition": repetition})
                    print(f"{side}, {mbit:g} Mbit/s: {line['ms_per_step']:.0f} ms", flush=True)
    if arguments.table or not arguments.what:
        Console(width=200).print(made())


if __name__ == "__main__":
    main()
