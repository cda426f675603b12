"""Quality under a step that is delayed by one, by strength of its correction: a small GPT, 10 % bank, 2 processes.

python -m benchmarks.quality.delay [--rates 1e-3 2e-3 4e-3] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.quality.tasks import TASKS
from benchmarks.result_files import ResultFile

SETTINGS = ("none", "delay:0", "delay:1")


def measure(setting: str, rate: float, seed: int) -> float:
    """Validation loss at the end of a run."""
    options: dict[str, Any] = {**TASKS["gpt-small"], "optimizer.name": "adamw", "optimizer.lr": rate, "seed": seed}
    options |= {"share.budget": "10%", "share.seed": seed, "engine.overlap": setting, "name": "delay"}
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        settings = [
            f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in options.items()
        ]
        command = [sys.executable, *launcher, "-m", "dist_ssn.cli", "train", f"--output={folder}", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=900)
        return json.loads((Path(folder) / "delay" / "summary.json").read_text())["rows"][0]["validation_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    results = ResultFile("delay")
    found: dict[tuple[str, float], list[float]] = {}
    for setting, (rate, seed) in track(
        list(itertools.product(SETTINGS, itertools.product(arguments.rates, arguments.seeds)))
    ):
        loss = measure(setting, rate, seed)
        found.setdefault((setting, rate), []).append(loss)
        results.add({"way": setting, "rate": rate, "seed": seed, "validation_loss": loss})
    table = Table("overlap", *(f"rate {rate:g}: mean (seed by seed)" for rate in arguments.rates))
    for setting in SETTINGS:
        rows = [found[setting, rate] for rate in arguments.rates]
        table.add_row(setting, *(f"{statistics.mean(row):.3f} ({', '.join(f'{x:.3f}' for x in row)})" for row in rows))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
