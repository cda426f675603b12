"""Table of growing: banks that grow in the middle of a run, beside constant ones of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.growing.cells import KEYS, NAMES, TASKS, Line, identity, moments_of_growth, pairs
from benchmarks.markdown import grid, mean, short
from benchmarks.result_files import lines_of


def _lines() -> list[Line]:
    return list({identity(line): line for line in lines_of("growing")}.values())


def _runs(like: Line, lines: Sequence[Line]) -> list[Line]:
    """The runs with all seeds of a cell."""
    same = [line for line in lines if all(line[key] == like[key] for key in KEYS if key != "seed")]
    return sorted(same, key=lambda line: line["seed"])


def _loss(like: Line, lines: Sequence[Line]) -> str:
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


TABLES: dict[str, Callable[[], str]] = {"growing": growing}
