"""Predictions of `dist-ssn plan --cluster` for a step, against the step in the lab: models × budgets × bandwidths × engines.

    sudo python -m benchmarks.network.prediction [--hosts 2] [--mbit 50 200] [--repetitions 3]
    python -m benchmarks.network.prediction --table

Compute is measured once per model and budget, on all hosts at once (`--calibrate`), and every prediction of it is made from that
file. As many hosts as processors: with more, ranks wait for each other's compute, which is the machine's and not the network's.
Resumable; writes results/prediction/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network.in_the_lab import cluster_file, in_the_lab, quietly
from benchmarks.result_files import ResultFile

Line = dict[str, Any]
WARM_UP, STEPS = 10, 30
MODELS = {
    "gpt-128": {"layers": 4, "width": 128, "heads": 4, "context": 128},
    "gpt-256": {"layers": 2, "width": 256, "heads": 4, "context": 64},
}
BUDGETS = (None, 0.02, 0.1, 0.5)
ENGINES = {"ddp": "torchrun", "mpi": "mpirun"}
COMMON = ["--config=quickstart", "--batch_size=8", "--threads=1", "--schedule.warmup=1"]


def calibrate(hosts: int, model: str, budget: float, folder: Path, more: Sequence[str] = ()) -> Path:
    """Measures compute, dense and shared, on all hosts at once; `more` are further settings of the recipe."""
    kept = folder / "compute.json"
    cluster = cluster_file(folder, hosts=hosts, mbit=100)
    settings = [*COMMON, f"--model_args={json.dumps(MODELS[model])}", f"--share.budget={budget}", *more]
    in_the_lab(cluster, folder / "logs", ["plan", *settings, f"--cluster={cluster}", f"--calibrate={kept}", "--json"])
    return kept


def predict(cluster: str, model: str, budget: float, compute: Path, more: Sequence[str] = ()) -> dict[str, Line]:
    """Alternative → its prediction."""
    settings = [*COMMON, f"--model_args={json.dumps(MODELS[model])}", f"--share.budget={budget}", *more]
    command = ["-m", "dist_ssn.cli", "plan", *settings, f"--cluster={cluster}", f"--compute={compute}", "--json"]
    said = quietly(command)
    return {row["way"]: row for row in json.loads(said)["ways"]}


def measure(
    cluster: str, engine: str, model: str, budget: float | None, folder: Path, more: Sequence[str] = ()
) -> Line:
    """Figures of a short run on the hosts."""
    lengths = [f"--steps={WARM_UP + STEPS}", f"--evaluate_every={WARM_UP}", "--evaluate_batches=1", "--no-progress"]
    settings = [*COMMON, f"--model_args={json.dumps(MODELS[model])}", f"--share.budget={json.dumps(budget)}"]
    program = ["train", *settings, *lengths, *more, f"--engine.name={engine}", f"--output={folder}", "--name=run"]
    in_the_lab(cluster, folder / "logs", program)
    row = json.loads((folder / "run" / "summary.json").read_text())["rows"][0]
    return {key: row[key] for key in ("ms_per_step", "bytes_per_step_logical")}


def table(lines: list[Line]) -> Table:
    """A table of medians, and the error of each prediction."""
    shown = Table(
        "engine", "model", "budget", "hosts", "Mbit/s", "ms per step: median (min-max)", "predicted", "off", "bytes off"
    )
    cells: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        key = (line["engine"], line["model"], line["budget"], line["hosts"], line["mbit"])
        cells.setdefault(key, []).append(line)
    errors = []
    for key, mine in cells.items():
        ms = [line["ms_per_step"] for line in mine]
        predicted = statistics.median(line["predicted_ms_per_step"] for line in mine)
        errors.append(predicted / statistics.median(ms) - 1)
        sent = mine[0]["predicted_bytes_per_step_logical"] / mine[0]["bytes_per_step_logical"] - 1
        middle = f"{statistics.median(ms):.0f} ({min(ms):.0f}-{max(ms):.0f})"
        engine, model, budget, hosts, mbit = key
        named = (engine, model, f"{budget:.0%}" if budget else "dense", str(hosts), f"{mbit:g}")
        shown.add_row(*named, middle, f"{predicted:.0f}", f"{errors[-1]:+.0%}", f"{sent:+.1%}")
    shown.caption = caption_of(errors)
    return shown


def caption_of(errors: Sequence[float]) -> str | None:
    """Number of cells, and how far their predictions are off; None without any."""
    sizes = [abs(error) for error in errors]
    middle = statistics.median(sizes) if sizes else 0.0
    return f"{len(sizes)} cells; off by {middle:.1%} in the median, {max(sizes):.1%} at most" if sizes else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mbit", nargs="+", type=float, default=[50, 200])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("prediction")
    done = {tuple(line[key] for key in KEYS) for line in results.lines()}
    models: list[str] = [] if arguments.table else arguments.models
    for repetition, model in itertools.product(range(arguments.repetitions), models):
        for budget in BUDGETS:
            with tempfile.TemporaryDirectory() as name:
                folder, compute = Path(name), None
                for engine, mbit in [(engine, float(mbit)) for engine in ENGINES for mbit in arguments.mbit]:
                    cell: Line = {
                        "engine": engine,
                        "model": model,
                        "budget": budget,
                        "hosts": arguments.hosts,
                        "mbit": mbit,
                    }
                    cell["repetition"] = repetition
                    if tuple(cell[key] for key in KEYS) in done:
                        continue
                    compute = compute or calibrate(arguments.hosts, model, budget or 0.1, folder)
                    cluster = cluster_file(folder, hosts=arguments.hosts, mbit=mbit, launcher=ENGINES[engine])
                    predicted = predict(cluster, model, budget or 0.1, compute)["none" if budget else "dense"]
                    measured = measure(cluster, engine, model, budget, folder)
                    said = {f"predicted_{key}": predicted[key] for key in ("ms_per_step", "bytes_per_step_logical")}
                    results.add({**cell, **measured, **said})
                    print(
                        cell, f"{measured['ms_per_step']:.0f} ms, predicted {predicted['ms_per_step']:.0f}", flush=True
                    )
    Console(width=160).print(table(list(results.lines())))


KEYS = ("engine", "model", "budget", "hosts", "mbit", "repetition")

if __name__ == "__main__":
    main()
