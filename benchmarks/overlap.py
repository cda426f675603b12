"""How long a step waits for the network, by each way to overlap communication, measured and as `dist-ssn plan` predicts it.

    sudo python -m benchmarks.overlap --hosts h0 h1 h2 h3 --address 10.77.0.1 --cluster emulated-100mbit

The hosts are network namespaces as for `benchmarks.interface_bytes`, with the links that the cluster file says. In each of
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

from .interface_bytes import run_on, train_on
from .results import ResultFile

WARM_UP = 10
"""Steps before those that count: processes connect, and DDP learns in which order its gradients come."""
SIDES: dict[str, list[str]] = {
    "dense": ["--share.budget=null"],
    **{way: ["--share.budget=10%", f"--engine.overlap={way}"] for way in ("none", "segments:4", "sums:2", "delay")},
    **{way: ["--share.budget=10%", f"--share.mapping={way}"] for way in ("depth:2", "depth:4")},
}
"""The names of `cost.ways` → recipe."""


def measure(arguments: argparse.Namespace, recipe: list[str]) -> dict[str, Any]:
    """Medians or means per step, as rank 0 saw them."""
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
    """Side → what `dist-ssn plan --cluster` says of it, with compute measured on all hosts."""
    program = ["plan", "--config", "quickstart", f"--batch_size={arguments.batch_size}", "--json"]
    said = run_on(arguments.hosts, arguments.address, arguments.device, [*program, f"--cluster={arguments.cluster}"])
    rows = json.loads(next(line for line in said.splitlines() if line.startswith("[")))
    return {row["way"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=["h0", "h1", "h2", "h3"])
    parser.add_argument("--address", default="10.77.0.1")
    parser.add_argument("--device", default="e0")
    parser.add_argument("--cluster", default="emulated-100mbit")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    results = ResultFile("overlap")
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    predicted: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    common = {"cluster": arguments.cluster, "hosts": len(arguments.hosts), "batch_size": arguments.batch_size}
    for _ in range(arguments.repetitions):
        told = predict(arguments)
        for side, recipe in SIDES.items():
            predicted[side].append(told[side])
            measured[side].append(measure(arguments, recipe))
            results.add(
                {"side": side, **common, "steps": arguments.steps, **measured[side][-1], "predicted": told[side]}
            )
    table = Table(
        "side",
        "rounds",
        "logical B/step",
        "exposed ms: median (min-max)",
        "predicted",
        "step ms: median (min-max)",
        "predicted",
    )
    for side, lines in measured.items():
        cells = []
        for key in ("exposed_ms_per_step", "ms_per_step"):
            values = [line[key] for line in lines]
            cells.append(f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})")
            cells.append(f"{statistics.median(line[key] for line in predicted[side]):.0f}")
        table.add_row(side, f"{lines[0]['rounds']:.1f}", f"{lines[0]['bytes_per_step_logical']:,}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
