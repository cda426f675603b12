"""Tables of quality by other ways: longer runs, a teacher, pruning, found plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .. import searches
from ..cells import RATES, at_best, cell, identity
from ..results import lines_of
from ..suites import LONGER, WAYS, distill, prune
from ..tasks import TASKS
from .markdown import difference, grid, mean, short
from .sizes import MODELS, losses, mean_of

Line = dict[str, Any]


def _measured(cells: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """Cells of a suite that were measured, and their lines."""
    known = {identity(line): line for line in lines_of("quality")}
    return ((one, known[identity(one)]) for one in cells if identity(one) in known)


def _columns(runs: list[Line]) -> list[str]:
    """How many seeds, losses, and accuracies where there are any."""
    accuracy = [100 * run["validation_accuracy"] for run in runs if "validation_accuracy" in run]
    return [str(len(runs)), losses(runs), *([mean(accuracy, ".2f")] if accuracy else [])]


_HEADINGS = ("seeds", "validation loss", "accuracy in %")


def longer(task: str) -> str:
    """A row per kind and budget, each at the best of its rates: as long as usual, and four times as long."""
    lines, steps = lines_of("quality"), 4 * TASKS[task]["steps"]
    known = {identity(line): line for line in lines}
    best: dict[tuple[str, float], Line] = {}
    for kind, budget, rates in LONGER[task]:
        runs = [known.get(identity(cell(task, kind, lr, more={"steps": steps}, budget=budget))) for lr in rates]
        if found := [run for run in runs if run is not None]:
            best[kind, budget] = min(found, key=lambda run: run["validation_loss"])
    rows = []
    for kind, budget, rates in LONGER[task]:
        if (kind, budget) in best:
            run, dense = best[kind, budget], best["dense", 0.1]
            usual = f"{mean_of(at_best(lines, task, kind)[1]):.3f}" if budget == 0.1 and task in RATES else ""
            apart = "" if kind == "dense" else f"{run['validation_loss'] / dense['validation_loss'] - 1:+.1%}"
            rate = f"{short(run['overrides']['optimizer.lr'])} of {', '.join(map(short, rates))}"
            name = {"dense": "dense", "equal": "dense, as small as 10 %"}.get(kind, f"{budget:.0%} bank")
            rows.append([name, f"{run['parameters']:,}", usual, f"{run['validation_loss']:.3f}", apart, rate])
    headings = ("parameters", f"{steps // 4:,} steps", f"{steps:,} steps", "from dense", "rate of the longer run")
    return grid((f"{task}, one seed", *headings), rows)


def teacher(task: str) -> str:
    """A row per budget and way to teach, and the mean difference that a teacher makes, seed by seed, with its standard error."""
    found: dict[tuple[float, str], dict[int, Line]] = {}
    for one, line in _measured(one for one in distill() if one["task"] == task):
        found.setdefault((one["overrides"]["share.budget"], one["way"]), {})[one["seed"]] = line
    rows = []
    for (budget, way), runs in found.items():
        alone = found[budget, "none"]
        apart = [runs[seed]["validation_loss"] - alone[seed]["validation_loss"] for seed in runs.keys() & alone.keys()]
        seeds, loss, *accuracy = _columns(list(runs.values()))
        shown = "" if way == "none" else difference(apart)
        rows.append([f"{budget:.0%} bank", way, seeds, loss, shown, *accuracy])
    headings = ("the teacher's part", "seeds", "validation loss", "from none", "accuracy in %")
    return grid((MODELS[task], *headings)[: len(rows[0])], rows)


def pruned(task: str) -> str:
    """A row per way to prune, beside what is as small from the start."""
    found: dict[str, list[Line]] = {}
    for one, line in _measured(one for one in prune() if one["task"] == task):
        found.setdefault(one["way"], []).append(line)
    rows = []
    for way, runs in found.items():
        sent, kept = runs[0]["parameters"], runs[0].get("kept_numbers")
        rows.append([way, f"{sent:,}", "" if kept is None else f"{kept:,}", *_columns(runs)])
    return grid((MODELS[task], "sent", "left of what is pruned", *_HEADINGS)[: len(rows[0])], rows)


def search(task: str) -> str:
    """Plain and found mappings after full training, best first."""
    return grid(searches.HEADINGS, list(map(list, searches.rows(lines_of("searches"), task))))


def _of(name: str, function: Callable[[str], str], tasks: Iterable[str]) -> dict[str, Callable[[], str]]:
    return {f"{name}-{task}": lambda task=task: function(task) for task in tasks}


TABLES: dict[str, Callable[[], str]] = {
    **_of("longer", longer, LONGER),
    **_of("teacher", teacher, WAYS),
    **_of("pruned", pruned, WAYS),
    **_of("search", search, searches.TASKS),
}
