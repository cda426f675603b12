"""Predictions of `dist-ssn plan --cluster` for rounds, against runs in the lab: budget × period × codec × bandwidth × delay.

    sudo python -m benchmarks.network.ladder_prediction [--hosts 2] [--repetitions 1] [--minutes 7]    # resumable
    sudo python -m benchmarks.network.ladder_prediction --limits
    python -m benchmarks.network.ladder_prediction --table

Half of all combinations: a delay where the other four settings have an odd number of second values. A step's time is the mean over
WINDOW steps, which are whole rounds; the bytes are those of the run's ledger. Compute is measured once per start of the program, on
all hosts at once, and again as what a run's steps take besides waiting, because other programs slow this machine down at times:
with the latter, the waiting alone is predicted. As many hosts as processors. "--limits" trains with nothing but `sync.limit`.
Writes results/ladder_prediction/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network.in_the_lab import cluster_file, in_the_lab, quietly
from benchmarks.network.prediction import caption_of
from benchmarks.result_files import ResultFile
from dist_ssn.cluster import load_cluster
from dist_ssn.cost.exchange import gather_seconds
from dist_ssn.cost.fabric import fabric_of
from dist_ssn.sync.reports import REPORT_BYTES
from dist_ssn.train.limit import sent_per_step, vectors_of
from dist_ssn.train.recipe.read import load_recipe

Line = dict[str, Any]
WINDOW = 48
STEPS = 2 * WINDOW + 4
BUDGETS, PERIODS, CODECS, MBIT = (None, 0.1), (4, 16), ("none", "int4"), (10.0, 40.0)
MODEL = '--model_args={"layers": 2, "width": 128, "heads": 4, "context": 64}'
COMMON = ["--config=quickstart", MODEL, "--batch_size=8", "--threads=1", "--schedule.warmup=1"]
LIMITS = ("2kB/step", "20kB/step", "200kB/step")
KEYS = ("budget", "every", "codec", "mbit", "delay", "hosts", "repetition")


def cells() -> Iterator[Line]:
    """The settings of each cell."""
    for places in itertools.product((0, 1), repeat=4):
        budget, every, codec, mbit = (BUDGETS[places[0]], PERIODS[places[1]], CODECS[places[2]], MBIT[places[3]])
        yield {"budget": budget, "every": every, "codec": codec, "mbit": mbit, "delay": sum(places) % 2}


def calibrate(hosts: int, folder: Path) -> Path:
    """Measures compute and rates, on all hosts at once."""
    kept = folder / "compute.json"
    cluster = cluster_file(folder, hosts=hosts, mbit=100)
    program = ["plan", *COMMON, "--share.budget=0.1", f"--cluster={cluster}", f"--calibrate={kept}", "--json"]
    in_the_lab(cluster, folder / "logs", program)
    return kept


def predict(cluster: str, compute: Path, cell: Line) -> Line:
    """Milliseconds of a step, and of its waiting if nothing hides it."""
    command = ["plan", *COMMON, "--share.budget=0.1", f"--cluster={cluster}", f"--compute={compute}", "--json"]
    rows = json.loads(quietly(["-m", "dist_ssn.cli", *command]))["ladder"]
    wanted = {key: cell[key] for key in ("budget", "every", "codec", "delay")} | {"own": False}

    def row_of(wanted: Line) -> Line:
        return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))

    waiting = row_of(wanted | {"delay": 0})["exposed_ms_per_step"]
    return {"predicted_ms_per_step": row_of(wanted)["ms_per_step"], "predicted_unhidden_ms_per_step": waiting}


def with_own_compute(cell: Line, cluster: str) -> float:
    """Milliseconds of a step, predicted from what the run's own steps took besides waiting."""
    own = cell["ms_per_step"] - cell["exposed_ms_per_step"]
    waiting = cell["predicted_unhidden_ms_per_step"]
    if cell["delay"]:
        fabric = fabric_of(load_cluster(cluster), cell["hosts"], 1)
        report = 1000 * gather_seconds(REPORT_BYTES, cell["hosts"], fabric) / cell["every"]
        waiting = report + max(0.0, waiting - report - own)
    return own + waiting


SIZES = [f"--steps={STEPS}", "--evaluate_every=100000", "--evaluate_batches=1", f"--checkpoint.every={WINDOW}"]


def settings_of(cell: Line) -> list[str]:
    """The recipe of a cell."""
    sync = (f"--sync.{key}={cell[key]}" for key in ("every", "codec", "delay"))
    return [*COMMON, *SIZES, *sync, f"--share.budget={json.dumps(cell['budget'])}"]


def trained(cluster: str, settings: list[str], folder: Path) -> tuple[Path, Line]:
    """Folder and summary of a run on the hosts."""
    program = ["train", *settings, "--no-progress", f"--output={folder}", f"--name=run-{os.getpid()}"]
    in_the_lab(cluster, folder / "logs", program)
    run = folder / f"run-{os.getpid()}"
    return run, json.loads((run / "summary.json").read_text())


def limited(text: str, hosts: int, folder: Path) -> Line:
    """Bytes of a run that is given `sync.limit` alone."""
    cluster = cluster_file(folder, hosts=hosts, mbit=MBIT[-1])
    _, summary = trained(cluster, [*COMMON, *SIZES, "--share.budget=null", f"--sync.limit={text}"], folder)
    sent = summary["rows"][0]["bytes_per_step_ring"]
    return {"limit": text, "hosts": hosts, "bytes_per_step_ring": sent, "chosen": summary["chosen"][0]}


def measure(cluster: str, cell: Line, folder: Path) -> Line:
    """Figures of a run on the hosts."""
    run, summary = trained(cluster, settings_of(cell), folder)
    row = summary["rows"][0]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("seconds", "exposed_seconds")
    at, waited = ({line["step"]: line[key] for line in logged if key in line} for key in keys)
    took = [1000 * (one[2 * WINDOW] - one[WINDOW]) / WINDOW for one in (at, waited)]
    return {
        "ms_per_step": took[0],
        "exposed_ms_per_step": took[1],
        **{key: row[key] for key in ("bytes_per_step_logical", "bytes_per_step_ring")},
    }


def predicted_bytes(cell: Line) -> dict[str, int]:
    """Bytes per step, handed to collectives and sent, as a run's summary averages them; a limit of as many keeps the cell."""
    recipe = load_recipe("quickstart", settings_of(cell)[1:])
    dense = cell["budget"] is None
    vector = next(found for _, kind, _, found in vectors_of(recipe) if not dense or kind == "dense")
    found = sent_per_step(vector, recipe, cell["hosts"], cell["every"], cell["codec"])
    logical, ring = "predicted_bytes_per_step_logical", "predicted_bytes_per_step_ring"
    return {logical: round(found.handed), ring: round(found.sent)}


def table(lines: list[Line]) -> Table:
    """Medians, and the error of each prediction."""
    headings = (
        "budget",
        "every",
        "codec",
        "Mbit/s",
        "delay",
        "ms per step: median (min-max)",
        "predicted",
        "off",
        "with the run's own compute",
        "off",
        "bytes off",
    )
    shown = Table(*headings)
    found: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        if "predicted_own_ms_per_step" not in line:
            continue
        found.setdefault(tuple(line[key] for key in KEYS[:-1]), []).append(line)
    errors, own_errors = [], []
    for (budget, every, codec, mbit, delay, _), mine in found.items():
        ms = [line["ms_per_step"] for line in mine]
        predicted = statistics.median(line["predicted_ms_per_step"] for line in mine)
        own = statistics.median(line["predicted_own_ms_per_step"] for line in mine)
        errors.append(predicted / statistics.median(ms) - 1)
        own_errors.append(own / statistics.median(ms) - 1)
        sent = {
            line[f"bytes_per_step_{what}"] - line[f"predicted_bytes_per_step_{what}"]
            for line in mine
            for what in ("logical", "ring")
        }
        middle = f"{statistics.median(ms):.0f} ({min(ms):.0f}-{max(ms):.0f})"
        named = ("dense" if budget is None else f"{budget:.0%}", str(every), codec, f"{mbit:g}", str(delay))
        figures = (f"{predicted:.0f}", f"{errors[-1]:+.0%}", f"{own:.0f}", f"{own_errors[-1]:+.0%}")
        shown.add_row(*named, middle, *figures, ", ".join(map(str, sorted(sent))))
    if errors:
        shown.caption = f"{caption_of(errors)}; with the run's own compute {caption_of(own_errors)}"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after this time")
    parser.add_argument("--limits", action="store_true", help="only runs of sync.limit")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("ladder_prediction")
    until = time.monotonic() + 60 * arguments.minutes
    done = {tuple(line[key] for key in KEYS) for line in results.lines() if "predicted_own_ms_per_step" in line}
    for text in LIMITS if arguments.limits else ():
        with tempfile.TemporaryDirectory() as name:
            results.add(line := limited(text, arguments.hosts, Path(name)))
            print(line, flush=True)
    for repetition in range(0 if arguments.table or arguments.limits else arguments.repetitions):
        with tempfile.TemporaryDirectory() as name:
            folder, compute = Path(name), None
            for cell in cells():
                cell |= {"hosts": arguments.hosts, "repetition": repetition}
                if tuple(cell[key] for key in KEYS) in done or time.monotonic() > until:
                    continue
                compute = compute or calibrate(arguments.hosts, folder)
                cluster = cluster_file(folder, hosts=arguments.hosts, mbit=cell["mbit"])
                load = os.getloadavg()[0]
                line = {**cell, **predict(cluster, compute, cell), **predicted_bytes(cell), "load": load}
                line |= measure(cluster, cell, folder)
                line["predicted_own_ms_per_step"] = with_own_compute(line, cluster)
                results.add(line)
                print({key: value for key, value in line.items() if key not in ("hosts", "repetition")}, flush=True)
    Console(width=140).print(table(results.lines()))


if __name__ == "__main__":
    main()
