"""Tables of growing: banks that grow in the middle of a run, beside constant ones of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.growing.cells import CONSTANT, KEYS, NAMES, RATES, TASKS, cell, identity, moments_of_growth, pairs, ways
from benchmarks.markdown import grid, mean, short
from benchmarks.result_files import latest, lines_of

Line = dict[str, Any]


def _lines() -> list[Line]:
    return list({identity(line): line for line in lines_of("growing")}.values())


def _runs(like: Line, lines: list[Line]) -> list[Line]:
    """The runs with all seeds of a cell."""
    same = [line for line in lines if all(line[key] == like[key] for key in KEYS if key != "seed")]
    return sorted(same, key=lambda line: line["seed"])


def _loss(like: Line, lines: list[Line]) -> str:
    """Losses of all seeds, and the learning rate."""
    return f"{mean([run['validation_loss'] for run in _runs(like, lines)])} at {short(like['lr'])}"


def growing() -> str:
    """A row per growing bank, each side at its best learning rate of seed 0."""
    lines, rows = _lines(), []
    for task in TASKS:
        for grows, stays in pairs(task, lines):
            fraction = "a third" if grows["grow_at"] == moments_of_growth(task)[0] else "two thirds"
            from_to = f"{grows['budget']:.0%} → {3 * grows['budget']:.0%} after {fraction}"
            both = [run["seed"] for run in _runs(grows, lines)]
            losses = [
                [run["validation_loss"] for run in _runs(side, lines) if run["seed"] in both] for side in (grows, stays)
            ]
            apart = sum(losses[0]) / sum(losses[1]) - 1 if len(losses[0]) == len(losses[1]) else float("nan")
            sizes = (f"{grows['bytes'] / 1e6:.0f}", f"{stays['parameters']:,}")
            rows.append([NAMES[task], from_to, *sizes, _loss(grows, lines), _loss(stays, lines), f"{apart:+.1%}"])
    headings = (
        "grows",
        "MB",
        "parameters of the constant bank",
        "loss, grows",
        "loss, constant",
        "growing from constant",
    )
    return grid(("", *headings), rows)


def constants() -> str:
    """A row per constant budget and task, at its best learning rate."""
    known, rows = latest(_lines(), KEYS), []
    for task in TASKS:
        for budget in CONSTANT:
            cells = [cell(task, budget, lr) for lr in RATES[task]]
            found = [known[key] for one in cells if (key := tuple(one[name] for name in KEYS)) in known]
            if found:
                best = min(found, key=lambda line: line["validation_loss"])
                rows.append([NAMES[task], f"{budget:.0%}", f"{best['bytes'] / 1e6:.0f}", _loss(best, _lines())])
    return grid(("", "constant budget", "MB", "loss"), rows)


def carried() -> str:
    """A row per task and way of carrying Adam's moments."""
    lines, rows = {identity(line): line for line in _lines()}, []
    names = {"independent": "m/3, v/3", "equal": "m/3, v/9", "as they were": "m, v", "from zero": "none"}
    for task in TASKS:
        for wanted in ways(task, lines.values()):
            if (line := lines.get(identity(wanted))) is not None:
                rows.append([NAMES[task], names[line["moments"]], f"{line['validation_loss']:.3f}"])
    return grid(("", "first and second moment of each copy", "loss"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "growing": growing,
    "growing-constants": constants,
    "growing-moments": carried,
}
