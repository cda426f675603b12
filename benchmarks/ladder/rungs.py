"""Rungs of the ladder: what was measured, each at its best setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.ladder.cells import identity
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


def shortest(above: Mapping[int, float]) -> int:
    """Steps of the shortest run that is not above dense; of the longest that was tried, if none is.

    Args:
        above: steps → mean loss above dense's, as a fraction.
    """
    return min((steps for steps in above if above[steps] <= 0), default=max(above))


def rungs(task: str) -> dict[Rung, list[Line]]:
    """Rung → its runs, a seed each, at the setting with the most seeds; among equals, the one with the least mean loss."""
    settings: dict[Rung, dict[tuple[Any, ...], list[Line]]] = {}
    for line in lines_by_cell().values():
        if line["task"] == task:
            rung = (line["kind"], line["budget"], line["every"], line["codec"])
            settings.setdefault(rung, {}).setdefault((line["lr"], *line["outer"]), []).append(line)
    found = {rung: min(runs.values(), key=lambda runs: (-len(runs), loss_of(runs))) for rung, runs in settings.items()}
    return {rung: sorted(runs, key=lambda run: run["seed"]) for rung, runs in found.items()}
