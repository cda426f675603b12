"""Time that a step waits for the network, by overlap setting, measured and as `dist-ssn plan` predicts it.

    sudo python -m benchmarks.network.overlap --hosts h0 h1 h2 h3 --address 10.77.0.1 --cluster emulated-100mbit

The hosts are network namespaces as for `benchmarks.network.interface_bytes`, with the links that the cluster file says. In each of
`--repetitions`, the prediction (which measures compute on all hosts at once) and all sides in turn; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network.interface_bytes import run_on, train_on
from benchmarks.result_files import ResultFile

WARM_UP = 10
"""Steps before those that count: processes connect, and DDP learns in which order its gradients come."""
SIDES: dict[str, list[str]] = {
    "dense": ["--share.budget=null"],
    **{name: ["--share.budget=10%", f"--engine.overlap={name}"] for name in ("none", "segments:4", "sums:2", "delay")},
    **{name: ["--share.budget=10%", f"--share.mapping={name}"] for name in ("depth:2", "depth:4")},
}
"""The names of `cost.alternatives` → recipe."""


def measure(arguments: argparse.Namespace, recipe: list[str]) -> dict[str, Any]:
    """Medians or means per step, on rank 0."""
    total = WARM_UP + arguments.steps
    steps = [f"--steps={total}", f"--evaluate_every={WARM_UP}", "--evaluate_batches=1"]
    recipe = [f"--batch_size={arguments.batch_size}", *steps, *recipe]
    with tempfile.TemporaryDirectory() as folder:
        summary = train_on(arguments.hosts, arguments.address, arguments.device, recipe, folder)
        lines = [json.loads(line) for line in (Path(folder) / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    (row,), gradients = summary["rows"], [r for r in summary["ledger"] if r["purpose"] == "gradients"]
    exposed = {line["step"]: line["exposed_seconds"] for line in lines if "step" in line}
    return {
        "ms_per_step": row["ms_per_step"],
        "exposed_ms_per_step": 1000 * (exposed[total] - exposed[WARM_UP]) / arguments.steps,
        "rounds": sum(r["operations"] for r in gradients) / total,
        "bytes_per_step_logical": row["bytes_per_step_logical"],
    }


def predict(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Side → prediction of `dist-ssn plan --cluster`, with compute measured on all hosts."""
    program = ["plan", "--config", "quickstart", f"--batch_size={arguments.batch_size}", "--json"]
    said = run_on(arguments.hosts, arguments.address, arguments.device, [*program, f"--cluster={arguments.cluster}"])
    predicted = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    return {row["way"]: row for row in predicted["ways"]}


def table_of(lines: list[dict[str, Any]]) -> Table:
    """A table of measured medians, beside the medians of the predictions for the same runs."""
    table = Table("side", "rounds", "logical B/step")
    for what in ("exposed ms", "step ms"):
        table.add_column(f"{what}: median (min-max)", justify="right")
        table.add_column("predicted", justify="right")
    for side in SIDES:
        mine = [line for line in lines if line["side"] == side]
        cells = []
        for key in ("exposed_ms_per_step", "ms_per_step"):
            values = [line[key] for line in mine]
            predicted = statistics.median(line["predicted"][key] for line in mine)
            middle = statistics.median(values)
            cells.append(f"{middle:.0f} ({min(values):.0f}-{max(values):.0f})")
            cells.append(f"{predicted:.0f} ({predicted / middle - 1:+.0%})")
        table.add_row(side, f"{mine[0]['predicted']['rounds']}", f"{mine[0]['bytes_per_step_logical']:,}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=["h0", "h1", "h2", "h3"])
    parser.add_argument("--address", default="10.77.0.1")
    parser.add_argument("--device", default="e0")
    parser.add_argument("--cluster", default="emulated-100mbit")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="measure nothing, show the newest results")
    arguments = parser.parse_args()
    results = ResultFile("overlap")
    common = {"cluster": arguments.cluster, "hosts": len(arguments.hosts), "batch_size": arguments.batch_size}
    for _ in range(0 if arguments.table else arguments.repetitions):
        predicted = predict(arguments)
        for side, recipe in SIDES.items():
            line = {**common, "steps": arguments.steps, **measure(arguments, recipe), "predicted": predicted[side]}
            results.add({"side": side, **line})
    lines = results.lines()
    Console(width=140).print(table_of([line for line in lines if line["commit"] == lines[-1]["commit"]]))


if __name__ == "__main__":
    main()
