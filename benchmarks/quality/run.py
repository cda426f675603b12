"""Measures quality at equal data, batch and steps: shared models against dense ones, each at its own best learning rate.

    python -m benchmarks.quality.run rates controls morphs confirm budgets [--jobs 2]     # resumable: measured cells stay
    python -m benchmarks.quality.run --table

Every cell is one run of `dist_ssn.train` on one thread; its line in `results/quality/` holds the recipe's overrides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile

from rich.console import Console
from rich.table import Table

from benchmarks.quality.cells import TWIN, Cell, cell, identity, recipe_of
from benchmarks.quality.suites import SUITES
from benchmarks.quality.tasks import TASKS
from benchmarks.result_files import ResultFile, chosen, provenance
from dist_ssn.train.loop import train


def run(wanted: Cell) -> Cell:
    """Trains one cell in this process, its teacher first if it has one. Returns the cell with its measurements."""
    commit = provenance()["commit"]
    with tempfile.TemporaryDirectory() as folder:
        made = wanted
        if (teacher := wanted["overrides"].get("distill.teacher", "")).startswith(TWIN):
            twin = cell(wanted["task"], "dense", float(teacher.removeprefix(TWIN)), wanted["seed"], {"name": "teacher"})
            train(recipe_of(twin, folder), progress=False)
            made = {**wanted, "overrides": {**wanted["overrides"], "distill.teacher": f"{folder}/teacher"}}
        row = train(recipe_of(made, folder), progress=False).row
    row.pop("name")
    history = [{key: point[key] for key in ("step", "validation_loss")} for point in row.pop("history")]
    return {**wanted, **row, "history": history, "commit": commit}


def table(lines: list[Cell]) -> Table:
    """A table of mean, spread and number of seeds of each method, best first within its task."""
    methods: dict[tuple[str, str, str], list[Cell]] = {}
    for line in lines:
        shown = {k: v for k, v in line["overrides"].items() if k not in ("model_args", "share.seed")}
        methods.setdefault((line["task"], line["kind"], json.dumps(shown)), []).append(line)
    result = Table("task", "kind", "settings", "parameters", "validation loss", "spread", "accuracy", "runs")
    for (task, kind, shown), runs in sorted(
        methods.items(), key=lambda item: (item[0][0], _mean(item[1], "validation_loss"))
    ):
        losses = [run["validation_loss"] for run in runs]
        accuracy = f"{_mean(runs, 'validation_accuracy'):.4f}" if "validation_accuracy" in runs[0] else ""
        spread = f"{max(losses) - min(losses):.4f}" if len(runs) > 1 else ""
        mean = f"{statistics.mean(losses):.4f}"
        result.add_row(task, kind, shown, f"{runs[0]['parameters']:,}", mean, spread, accuracy, str(len(runs)))
    return result


def _mean(runs: list[Cell], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="only these")
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="cells whose line has one of these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="print what is measured so far")
    arguments = parser.parse_args()
    results = ResultFile("quality")
    for suite in chosen(parser, arguments.suites, SUITES):
        done = {identity(line) for line in results.lines()}
        cells = [one for one in SUITES[suite]() if one["task"] in arguments.tasks]
        named = {identity(one): one for one in cells if any(text in identity(one) for text in arguments.only)}
        wanted = [one for name, one in named.items() if name not in done]
        for line in results.measure(run, wanted, arguments.jobs, suite=suite):
            print(f"  {line['validation_loss']:.4f}  {identity(line)}", flush=True)
    if arguments.table or not arguments.suites:
        Console(width=200).print(table(list(results.lines())))


if __name__ == "__main__":
    main()
