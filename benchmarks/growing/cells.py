"""Cells of `benchmarks.growing.run`: one run each, with a bank that grows three times or one of a constant size."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.growing.tiling import grown_plan
from benchmarks.ladder.cells import TASKS as OF_LADDER
from benchmarks.quality.cells import DEFAULT, SEEDS
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import make_plan
from dist_ssn.train.data import load_task
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe

Cell = dict[str, Any]
Line = Mapping[str, Any]
TASKS: dict[str, dict[str, Any]] = {
    "gpt": {**OF_LADDER["gpt"], "steps": 1800, "evaluate_every": 300},
    "lstm": {**OF_LADDER["lstm"], "steps": 900, "evaluate_every": 150},
}
"""task → settings of its recipe: the ladder's models and data, on one process, with one cosine."""
NAMES = {"gpt": "GPT, 2 layers of width 64", "lstm": "LSTM, 2 layers of width 64"}
RATES: dict[str, tuple[float, ...]] = {"gpt": (6e-3, 1.2e-2), "lstm": (6e-3, 1.2e-2, 2.4e-2)}
"""Learning rates that every method is tried at."""
CONSTANT, STARTS, MOMENTS = (0.1, 0.25, 0.5), (0.25, 0.1), "independent"
"""Budgets of constant banks; budgets before growing; how the other suites carry Adam's moments (the suite "ways" compares)."""


def cell(
    task: str, budget: float, lr: float, seed: int = 0, grow_at: int | None = None, moments: str = MOMENTS
) -> Cell:
    """A cell.

    Args:
        task: one of TASKS.
        budget: as a recipe's; before growing, if the bank grows.
        lr: learning rate of the recipe.
        seed: of weights, data and mapping together.
        grow_at: number of steps before the bank grows three times; None: it stays as it is.
        moments: a key of `tiling.MOMENTS`.
    """
    how = None if grow_at is None else moments
    return {"task": task, "budget": budget, "lr": lr, "seed": seed, "grow_at": grow_at, "moments": how}


KEYS = tuple(cell("gpt", 0.1, 1.0))


def identity(measured: Line) -> str:
    """The text that is equal for equal cells."""
    return json.dumps([measured[key] for key in KEYS])


def recipe_of(wanted: Line) -> Recipe:
    """Recipe of a cell, whose model has the bank of the run's start."""
    settings = {
        **TASKS[wanted["task"]],
        **{"optimizer.lr": wanted["lr"], "seed": wanted["seed"], "threads": 1},
        **{"share.budget": wanted["budget"], "share.morph": DEFAULT, "share.seed": wanted["seed"]},
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return load_recipe(None, [f"--{key}={text}" for key, text in texts.items()])


def moments_of_growth(task: str) -> tuple[int, int]:
    """Steps at which a bank grows: after a third and after two thirds of the run."""
    steps = TASKS[task]["steps"]
    return steps // 3, 2 * steps // 3


@functools.cache
def equal_budget(task: str, budget: float, grow_at: int) -> int:
    """The budget of a constant bank that sends as many bytes as one that grows at `grow_at`."""
    recipe = recipe_of(cell(task, budget, 1.0))
    specs = find_specs(build_model(recipe.model, recipe.model_args, load_task(recipe.data, context=64, seed=0)))
    before = make_plan(specs, budget, morph=DEFAULT)
    after = grown_plan(before)
    return (grow_at * before.parameters + (recipe.steps - grow_at) * after.parameters) // recipe.steps


def constants(task: str, lines: Iterable[Line]) -> Iterator[Cell]:
    """Constant banks at every learning rate."""
    for budget in CONSTANT:
        yield from (cell(task, budget, lr) for lr in RATES[task])


def ways(task: str, lines: Iterable[Line]) -> Iterator[Cell]:
    """Every way of carrying Adam's moments, from 10 % after a third of the run."""
    for how in ("independent", "equal", "as they were", "from zero"):
        yield cell(task, 0.1, 1.2e-2, grow_at=moments_of_growth(task)[0], moments=how)


def growing(task: str, lines: Iterable[Line]) -> Iterator[Cell]:
    """Banks that grow, and constant ones of as many bytes, at every learning rate."""
    for budget in STARTS:
        for grow_at in moments_of_growth(task):
            for lr in RATES[task]:
                yield cell(task, budget, lr, grow_at=grow_at)
                yield cell(task, equal_budget(task, budget, grow_at), lr)


def pairs(task: str, lines: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """The growing bank and the constant one of as many bytes, each at its best learning rate of seed 0, where both are measured."""
    known = {identity(line): line for line in lines}
    for budget in STARTS:
        for grow_at in moments_of_growth(task):
            sides = (
                [cell(task, budget, lr, grow_at=grow_at) for lr in RATES[task]],
                [cell(task, equal_budget(task, budget, grow_at), lr) for lr in RATES[task]],
            )
            found = [[known[identity(one)] for one in side if identity(one) in known] for side in sides]
            if all(found):
                best = [min(side, key=lambda line: line["validation_loss"]) for side in found]
                yield best[0], best[1]


def seeds(task: str, lines: Iterable[Line]) -> Iterator[Cell]:
    """Further seeds of the growing bank that is best beside its constant one, and of that."""
    measured = list(pairs(task, lines))
    for grows, stays in sorted(measured, key=lambda pair: pair[0]["validation_loss"] - pair[1]["validation_loss"])[:1]:
        for seed in SEEDS[1:]:
            for line in (grows, stays):
                yield {**{key: line[key] for key in KEYS}, "seed": seed}


SUITES = {"constants": constants, "ways": ways, "growing": growing, "seeds": seeds}
