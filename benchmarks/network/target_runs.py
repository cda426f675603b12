"""Runs of several lengths and learning rates, and the number of steps that reaches dense's final loss."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.quality.cells import SEEDS

Line = dict[str, Any]
Runs = dict[int, dict[int, dict[float, float]]]
"""steps of the run → seed → learning rate → final loss"""
Losses = dict[int, dict[int, float]]
"""steps of the run → seed → final loss at the best learning rate"""
TARGET_SUITES = ("target", "target-confirm")
SMALL = "dense, as small as 10 %"


def side_of(line: Line) -> str:
    """Name of the side that a line of `benchmarks.quality.run` measured."""
    budget = line["overrides"].get("share.budget")
    return f"{budget:.0%}" if budget else SMALL if line["kind"] == "equal" else str(line["kind"])


def all_runs(task: str, quality: Iterable[Line], own: Iterable[Line]) -> dict[str, Runs]:
    """Side → its runs, from the lines of `benchmarks.quality.run` and the curves of `benchmarks.network.time_to_target`."""
    found: dict[str, Runs] = {}

    def keep(side: str, steps: int, seed: int, rate: float, loss: float) -> None:
        found.setdefault(side, {}).setdefault(steps, {}).setdefault(seed, {})[rate] = loss

    for line in quality:
        if line["suite"] in TARGET_SUITES and line["task"] == task:
            recipe = line["overrides"]
            keep(side_of(line), recipe["steps"], line["seed"], recipe["optimizer.lr"], line["validation_loss"])
    for line in own:
        if line["what"] == "curve" and line["task"] == task:
            keep(line["side"], line["steps"], line["seed"], line["rate"], line["validation_loss"])
    return found


def losses_of(runs: Runs) -> Losses:
    return {steps: {seed: min(rates.values()) for seed, rates in seeds.items()} for steps, seeds in runs.items()}


def best_rate(runs: Runs) -> float:
    """Best learning rate of the first seed in its longest runs."""
    rates = runs[max(steps for steps, seeds in runs.items() if SEEDS[0] in seeds)][SEEDS[0]]
    return min(rates, key=lambda rate: rates[rate])


def steps_to(dense: dict[int, float], losses: Losses) -> int | None:
    """Number of steps of the shortest run whose mean loss is not above dense's, with the same seeds."""
    for steps, seeds in sorted(losses.items()):
        if statistics.mean(seeds.values()) <= statistics.mean(dense[seed] for seed in seeds):
            return steps
    return None
