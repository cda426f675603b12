"""How long a step waits for the network: a bank for all layers, banks by depth, and DDP's own overlap of a dense model.

    sudo python -m benchmarks.overlap --hosts h0 h1 h2 h3 --address 10.77.0.1

The hosts are network namespaces as for `benchmarks.interface_bytes`. Sides in turn, `--repetitions` times; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from rich.console import Console
from rich.table import Table

from .interface_bytes import train_on
from .results import ResultFile

SIDES: dict[str, list[str]] = {
    "dense, DDP": ["--share.budget=null"],
    "10 %, one bank": ["--share.budget=10%", "--share.mapping=single"],
    "10 %, depth:2": ["--share.budget=10%", "--share.mapping=depth:2"],
    "10 %, depth:4": ["--share.budget=10%", "--share.mapping=depth:4"],
}


def measure(arguments: argparse.Namespace, recipe: list[str]) -> dict[str, Any]:
    """Medians or means per step, as rank 0 saw them."""
    steps = [f"--steps={arguments.steps}", f"--evaluate_every={arguments.steps}", "--evaluate_batches=1"]
    with tempfile.TemporaryDirectory() as folder:
        summary = train_on(arguments.hosts, arguments.address, arguments.device, [*steps, *recipe], folder)
    (row,), gradients = summary["rows"], [r for r in summary["ledger"] if r["purpose"] == "gradients"]
    return {
        "ms_per_step": row["ms_per_step"],
        "exposed_ms_per_step": 1000 * sum(r["exposed_seconds"] for r in gradients) / arguments.steps,
        "rounds_per_step": sum(r["operations"] for r in gradients) / arguments.steps,
        "bytes_per_step_logical": row["bytes_per_step_logical"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=["h0", "h1", "h2", "h3"])
    parser.add_argument("--address", default="10.77.0.1")
    parser.add_argument("--device", default="e0")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    results = ResultFile("overlap")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(arguments.repetitions):
        for side, recipe in SIDES.items():
            found[side].append(measure(arguments, recipe))
            results.add({"side": side, "hosts": len(arguments.hosts), "steps": arguments.steps, **found[side][-1]})
    table = Table("side", "rounds", "logical B/step", "exposed ms/step: median (min-max)", "ms/step: median (min-max)")
    for side, lines in found.items():
        cells = []
        for key in ("exposed_ms_per_step", "ms_per_step"):
            values = [line[key] for line in lines]
            cells.append(f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})")
        table.add_row(side, f"{lines[0]['rounds_per_step']:.1f}", f"{lines[0]['bytes_per_step_logical']:,}", *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
