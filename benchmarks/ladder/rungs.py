"""Rungs of the ladder: what was measured, each at its best setting, and the file of losses that a planner can read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.ladder.cells import NAMES, WORKERS, identity
from benchmarks.result_files import lines_of

Line = dict[str, Any]
Rung = tuple[str, float | None, int, str]
"""Kind, budget, period, codec."""
DENSE: Rung = ("dense", None, 1, "none")


def lines_by_cell() -> dict[str, Line]:
    """The newest line of each cell."""
    return {identity(line): line for line in lines_of("ladder")}


def loss_of(runs: Iterable[Line]) -> float:
    return statistics.mean(run["validation_loss"] for run in runs)


def above_dense(runs: Iterable[Line], dense: Iterable[Line]) -> float:
    """Mean loss above that of dense with the same seeds, as a fraction."""
    losses = {run["seed"]: run["validation_loss"] for run in dense}
    pairs = [(run["validation_loss"], losses[run["seed"]]) for run in runs if run["seed"] in losses]
    return sum(mine for mine, _ in pairs) / sum(theirs for _, theirs in pairs) - 1


def rungs(task: str) -> dict[Rung, list[Line]]:
    """Rung → its runs, a seed each, at the setting with the most seeds; among equals, the one with the least mean loss."""
    settings: dict[Rung, dict[tuple[Any, ...], list[Line]]] = {}
    for line in lines_by_cell().values():
        if line["task"] == task:
            rung = (line["kind"], line["budget"], line["every"], line["codec"])
            settings.setdefault(rung, {}).setdefault((line["lr"], *line["outer"]), []).append(line)
    found = {rung: min(runs.values(), key=lambda runs: (-len(runs), loss_of(runs))) for rung, runs in settings.items()}
    return {rung: sorted(runs, key=lambda run: run["seed"]) for rung, runs in found.items()}


def expected_losses() -> str:
    """JSON: loss above dense's on every step, as a fraction, by budget, period and codec; dense and banks alone.

    Seeds are compared one by one. Keys: "limits" in words; "workers"; "tasks", for each its name, steps and dense loss; "rungs",
    each with budget (null: dense), every, codec, and for each task [fraction above dense's loss, seeds].
    """
    tasks = {task: rungs(task) for task in NAMES if DENSE in rungs(task)}
    made: dict[tuple[float | None, int, str], dict[str, list[float]]] = {}
    for task, found in tasks.items():
        for (kind, budget, every, codec), runs in found.items():
            if kind in ("dense", "bank"):
                above = round(above_dense(runs, found[DENSE]), 4)
                made.setdefault((budget, every, codec), {})[task] = [above, len(runs)]
    rows = [
        {"budget": budget, "every": every, "codec": codec, **losses}
        for (budget, every, codec), losses in sorted(made.items(), key=lambda item: (-(item[0][0] or 9), *item[0][1:]))
    ]
    described = {
        task: {"model": NAMES[task], "steps": found[DENSE][0]["steps"], "loss": round(loss_of(found[DENSE]), 4)}
        for task, found in tasks.items()
    }
    limits = "Small models, short runs, few seeds: the order of the rungs is what to read. docs/results/ladder.md has the runs."
    head = {"limits": limits, "workers": WORKERS, "tasks": described}
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return json.dumps(head, indent=2)[:-2] + f',\n  "rungs": [\n{lines}\n  ]\n}}\n'
