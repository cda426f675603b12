"""Bytes that four emulated hosts send, by their network devices, over the plan's figure, for each engine.

    sudo python -m benchmarks.network.lab_bytes [--steps 1000] [--engines ddp zero-1 mpi] [--recipe batch_size=4]

Each is `dist-ssn lab run` of the quick start at a budget of 50 %, start, evaluation, metrics and packet headers included. The
plan's figure is the need of all steps by the ring formula (benchmarks.network.engine_bytes). A full Ethernet frame of TCP carries
1448 bytes in 1514, so that nothing can be below 1.046 of it. Writes results/lab_bytes/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network.engine_bytes import theory
from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile

ENGINES = {
    "ddp": ("torchrun", ["--engine.name=ddp"]),
    "zero-1": ("torchrun", ["--engine.name=deepspeed", "--engine.stage=1"]),
    "mpi": ("mpirun", ["--engine.name=mpi"]),
}


def measure(engine: str, steps: int, recipe: list[str]) -> dict[str, Any]:
    """Runs one engine and reads the counters of its hosts."""
    launcher, settings = ENGINES[engine]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = ["train", "--config", "quickstart", f"--output={folder}", "--share.budget=50%", f"--steps={steps}"]
        program += [f"--evaluate_every={steps}", "--schedule.warmup=1", "--no-progress", *settings]
        program += [f"--{setting}" for setting in recipe]
        in_the_lab(cluster_file(folder, launcher=launcher), folder / "logs", program)
        row = json.loads((folder / "quickstart" / "summary.json").read_text())["rows"][0]
        counters = json.loads((folder / "logs" / "counters.json").read_text())
    sent = [host["sent_bytes"] for host in counters]
    hosts = len(sent)
    plan = theory(engine, row["parameters"], hosts) * steps
    return {
        **{"engine": engine, "launcher": launcher, "hosts": hosts, "steps": steps, "parameters": row["parameters"]},
        "recipe": recipe,
        **{"plan_bytes": plan, "ring_bytes": row["total_bytes"], "sent_bytes": sent},
        "sent_to_plan": [value / plan for value in sent],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--recipe", nargs="+", default=[], metavar="KEY=VALUE", help="what else the recipe says")
    arguments = parser.parse_args()
    results = ResultFile("lab_bytes")
    table = Table("engine", "plan, MB per host", "meter's ring, MB", "sent / plan, host by host")
    for engine in arguments.engines:
        line = measure(engine, arguments.steps, arguments.recipe)
        results.add(line)
        ratios = " ".join(f"{ratio:.3f}" for ratio in line["sent_to_plan"])
        table.add_row(engine, f"{line['plan_bytes'] / 1e6:.1f}", f"{line['ring_bytes'] / 1e6:.1f}", ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
