"""Trains a shared model, its dense twin, and a dense model of the same small size, on two processes: `make train`.

Each trains at the learning rate that `python -m benchmarks.quality.run rates` found best for it (results/quality/).
Writes runs/quickstart/summary.json and a plot, and prints the table; with --keep also lines of results/quickstart/, from which
README's picture is drawn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality.cells import best_rates
from benchmarks.quality.tasks import EQUAL
from benchmarks.result_files import ResultFile, lines_of
from dist_ssn.report import plot_loss_against_bytes, read_rows, summary_table

RECIPE = Path(__file__).parents[2] / "dist_ssn" / "recipes" / "quickstart.yaml"
OUTPUT = Path("runs") / "quickstart"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared 10%": ("shared", {}),
    "dense twin": ("dense", {"share.budget": None}),
    "equal-parameter dense": ("equal", {"share.budget": None, "model_args": EQUAL[0.1]["gpt"]}),
}
"""name → (kind in the table of learning rates, overrides of the recipe)."""


def start(name: str, overrides: dict[str, Any], processes: int) -> None:
    """Trains one run under torchrun; its own output goes to the terminal.

    Raises:
        SystemExit: The run failed; its own message is on the terminal.
    """
    settings = {**overrides, "name": name.replace(" ", "-"), "output": str(OUTPUT)}
    texts = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "dist_ssn.cli", "train", "--config", str(RECIPE), *texts]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"the run {name!r} ended with exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's")
    parser.add_argument("--keep", action="store_true", help="write results/quickstart/ too")
    arguments = parser.parse_args()
    console = Console()
    rates = best_rates(lines_of("quality"))
    rows = []
    for name, (kind, overrides) in RUNS.items():
        console.rule(name)
        steps = {"steps": arguments.steps, "schedule.warmup": min(50, arguments.steps // 2)} if arguments.steps else {}
        start(name, {**overrides, **steps, "optimizer.lr": rates["gpt", kind]}, arguments.processes)
        (row,) = read_rows([OUTPUT / name.replace(" ", "-")])
        rows.append({**row, "name": name})
    (OUTPUT / "summary.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if arguments.keep:
        results = ResultFile("quickstart")
        for row in rows:
            results.add({"processes": arguments.processes, **row})
    plot = plot_loss_against_bytes(rows, OUTPUT / "loss_against_bytes.png")
    console.print(summary_table(rows), f"\nwrote {OUTPUT / 'summary.json'} and {plot}")
    console.print(
        "Next: share your own model in three lines (README.md), and see what a plan would cost before you train:"
    )
    console.print("  dist-ssn plan --config dist_ssn/recipes/quickstart.yaml --share.budget=5%", highlight=False)


if __name__ == "__main__":
    main()
