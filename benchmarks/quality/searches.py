"""Plans that a search finds, after full training, beside the default and the plain mappings; and the cost of each search.

    python -m benchmarks.quality.searches [--tasks digits lstm …] [--jobs 2]      # resumable: measured cells stay
    python -m benchmarks.quality.searches --table

Tasks are those of `benchmarks.quality.run`, at 10 % and the default's best learning rate there, with three seeds (of weights, data
and mapping together) or all folds. A search's cost is its seconds on one thread and its training steps. Each step sends a bank, as
every other step does. Writes results/searches/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.markdown import difference, mean
from benchmarks.quality.cells import Cell, best_rates, cell, recipe_of, seeded, seeds_of
from benchmarks.quality.run import run
from benchmarks.result_files import ResultFile, latest, lines_of
from dist_ssn.mapping_search import search_recipe
from dist_ssn.mapping_search.methods import STEPS

TASKS = ("digits", "lstm", "gpt-small", "captions", "gpt", "vit", "wrn")
PLAIN = {"default": "auto", **{name: name for name in ("scale", "single", "shape", "depth:4")}}
"""mapping that needs no search → its name in a recipe"""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("random", "weights-free", "pretrain", "gradients", "auto")},
    "weights-free, split by sensitivity": ("weights-free", {"split": "sensitivity"}),
}
"""mapping → method of search that finds it, and its options"""
KEYS = ("task", "mapping", "seed")


def cells(tasks: Iterable[str], mappings: Iterable[str] = (*PLAIN, *METHODS)) -> Iterator[Cell]:
    """Cells of each mapping and seed; all of a seed before the next."""
    best = {task: rate for (task, kind), rate in best_rates(lines_of("quality")).items() if kind == "shared"}
    for task in tasks:
        rate = {"gpt-small": 8e-3, **best}[task]  # the small GPT's is the best of `quality budgets`
        for seed in seeds_of(task):
            for mapping in mappings:
                more = {"share.morph": "auto", "share.mapping": PLAIN.get(mapping, "auto"), **seeded("shared", seed)}
                yield {**cell(task, "shared", rate, seed, more), "mapping": mapping}


def measured(wanted: Cell) -> Cell:
    """Trains by a mapping, after a search if the mapping is a method of search."""
    if wanted["mapping"] not in METHODS:
        return run(wanted)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        began = time.monotonic()
        method, options = METHODS[wanted["mapping"]]
        plan = search_recipe(recipe_of(wanted, folder), method, output=output, **options)
        seconds = time.monotonic() - began
        steps = STEPS.get(method, 0)
        if method == "auto":
            trials = output.with_suffix(".trials.jsonl").read_text().splitlines()
            steps = sum(json.loads(line).get("steps", 0) for line in trials)
        overrides = {**wanted["overrides"], "share.budget": None, "share.morph": "auto", "share.plan": str(output)}
        line = run({**wanted, "overrides": overrides})
    found = {"search_seconds": seconds, "search_steps": steps, "banks": len(plan.groups)}
    return {**line, "overrides": wanted["overrides"], **found}


_COST = ("banks", "the search: seconds", "steps", "MB sent")
HEADINGS = ("mapping", "validation loss, mean (seed by seed)", "from the default", *_COST)


def rows(lines: Iterable[dict[str, Any]], task: str) -> list[tuple[str, ...]]:
    """Rows of a task's table, best mean first."""
    known = latest((line for line in lines if line["task"] == task), KEYS)
    found = []
    for mapping in (*PLAIN, *METHODS):
        runs = [known[task, mapping, seed] for seed in seeds_of(task) if (task, mapping, seed) in known]
        if runs:
            losses = [one["validation_loss"] for one in runs]
            cost = ("",) * len(_COST)
            if mapping in METHODS:
                seconds, steps = (
                    statistics.median(one[f"search_{key}"] for one in runs) for key in ("seconds", "steps")
                )
                banks = sorted({one["banks"] for one in runs})
                cost = (
                    " or ".join(map(str, banks)),
                    f"{seconds:.0f}",
                    f"{steps:.0f}",
                    f"{4e-6 * steps * runs[0]['parameters']:.1f}",
                )
            default = [known.get((task, "default", one["seed"])) for one in runs]
            apart = [
                one["validation_loss"] - beside["validation_loss"]
                for one, beside in zip(runs, default, strict=True)
                if beside
            ]
            shown = difference(apart) if apart and mapping != "default" else ""
            found.append((statistics.mean(losses), (mapping, mean(losses), shown, *cost)))
    return [row for _, row in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="only these")
    parser.add_argument(
        "--mappings", nargs="*", default=[*PLAIN, *METHODS], choices=[*PLAIN, *METHODS], help="only these"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("searches")
    if not arguments.table:
        done = latest(results.lines(), KEYS)
        wanted = [
            one for one in cells(arguments.tasks, arguments.mappings) if tuple(one[key] for key in KEYS) not in done
        ]
        for line in results.measure(measured, wanted, arguments.jobs):
            print(f"  {line['validation_loss']:.4f}  {[line[key] for key in KEYS]}", flush=True)
    for task in arguments.tasks:
        table = Table(*HEADINGS, title=task)
        for row in rows(results.lines(), task):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main()
