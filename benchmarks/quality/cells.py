"""Cells of `benchmarks.quality.run`: one run each, told by its task, kind, seed and what it overrides in the task's recipe."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.quality.tasks import EQUAL, SHALLOW, TASKS
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe

Cell = dict[str, Any]
Method = tuple[str, str, float]
"""A task, a kind, and the budget that the kind keeps or is as small as (dense: 0.1, for it has none)."""

_ADAMW, _SGD = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2), (0.05, 0.1, 0.2, 0.4, 0.8)
RATES: dict[str, tuple[float, ...]] = {
    **{"gpt": _ADAMW, "wrn": _SGD, "lstm": (*_ADAMW, 4.8e-2), "vit": _ADAMW},
    **{"captions": (7.5e-4, *_ADAMW), "digits": (3.75e-4, 7.5e-4, *_ADAMW)},
}
KINDS = ("dense", "equal", "shared")
CONTROLS = ("tied", "hashed", "hashed-global", "lowrank")
"""Kinds that are controls at the budget of "shared"; docs/guides/search.md says what each is."""
CONTROL_RATES: dict[str, tuple[float, ...]] = {
    **{task: (*grid, 2 * grid[-1]) for task, grid in RATES.items()},
    **{"gpt": _ADAMW[1:], "wrn": _SGD[1:4]},
}
"""One rate more for Adam, which nothing raises for a control as `parameter_groups` does for a bank; the slowest tasks have
fewer rates, about the best ones."""
LOW = 0.02
LOW_KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt", "lstm", "digits"), ("shared", "equal", "shallow", *CONTROLS)),
    "wrn": ("shared", *CONTROLS),
    **dict.fromkeys(("vit", "captions"), ("shared", "equal", "shallow", "hashed", "hashed-global")),
}
"""Kinds that can be made so small: no dense Wide ResNet can, and on small models the numbers are fewer than rank 1 wants."""
LOW_RATES: dict[tuple[str, str], tuple[float, ...]] = {
    **{("gpt", kind): (*_ADAMW[1:], 4.8e-2) for kind in ("equal", "shallow", "hashed", "hashed-global")},
    ("wrn", "hashed-global"): _SGD[1:],
}
"""Of controls so small that were the best at the last of CONTROL_RATES: one rate more."""
DEFAULT = "offset:chunk=16"
"""What "auto" chooses below a budget of 1 (gains where a weight is a matrix), named so that a line says what it measured."""
SEEDS = (0, 1, 2)
TWIN = "dense at "
"""Before a rate, as `distill.teacher`: a dense run of the task at that rate, with the seed of the cell."""
FOLDS = {"digits": 10}
"""Tasks without a test set of their own, which are cross-validated: a seed is a fold, too."""


def seeds_of(task: str) -> tuple[int, ...]:
    return tuple(range(FOLDS[task])) if task in FOLDS else SEEDS


def cell(
    task: str, kind: str, lr: float, seed: int = 0, more: dict[str, Any] | None = None, budget: float = 0.1
) -> Cell:
    """One run: `kind` is one of KINDS or CONTROLS, or "shallow"; `more` are overrides of the recipe."""
    small = {"equal": EQUAL, "shallow": SHALLOW}.get(kind)
    overrides: dict[str, Any] = {"model_args": small[budget][task]} if small else {}
    overrides |= {"share.budget": budget, "share.morph": DEFAULT} if kind == "shared" else {}
    overrides |= {"share.budget": budget, "share.control": kind} if kind in CONTROLS else {}
    return {"task": task, "kind": kind, "seed": seed, "overrides": {**overrides, "optimizer.lr": lr, **(more or {})}}


def seeded(kind: str, seed: int) -> dict[str, Any]:
    """What else a seed decides: where a weight reads the bank, or its buckets."""
    return {"share.seed": seed} if seed and kind not in ("dense", "equal", "shallow") else {}


def grids() -> Iterator[tuple[Method, tuple[float, ...]]]:
    """Every method and the rates that it is tried at."""
    for task, rates in RATES.items():
        for kind in KINDS:
            yield (task, kind, 0.1), rates
    for task, rates in CONTROL_RATES.items():
        for kind in (*CONTROLS, *(("shallow",) if task in SHALLOW[0.1] else ())):
            yield (task, kind, 0.1), rates
    for task, kinds in LOW_KINDS.items():
        for kind in kinds:
            of_controls = LOW_RATES.get((task, kind), CONTROL_RATES[task])
            yield (task, kind, LOW), RATES[task] if kind == "shared" else of_controls


def grid(methods: Iterable[Method]) -> Iterator[Cell]:
    """These methods at all their rates, one seed."""
    wanted = list(methods)
    for (task, kind, budget), rates in grids():
        if (task, kind, budget) in wanted:
            for lr in rates:
                yield cell(task, kind, lr, budget=budget)


def identity(measured: Cell) -> str:
    return json.dumps({key: measured[key] for key in ("task", "kind", "seed", "overrides")}, sort_keys=True)


def losses_by_rate(lines: Iterable[Cell], first_seed_only: bool = False) -> dict[Method, dict[float, float]]:
    """Each method's mean validation loss, by rate, where all seeds were measured."""
    measured = {identity(line): line["validation_loss"] for line in lines}
    found: dict[Method, dict[float, float]] = {}
    for method, rates in grids():
        task, kind, budget = method
        seeds = seeds_of(task)[: 1 if first_seed_only else None]
        for lr in rates:
            names = [identity(cell(task, kind, lr, seed, seeded(kind, seed), budget)) for seed in seeds]
            if measured.keys() >= set(names):
                found.setdefault(method, {})[lr] = statistics.mean(measured[name] for name in names)
    return found


def best_rates(lines: Iterable[Cell], budget: float = 0.1) -> dict[tuple[str, str], float]:
    """(task, kind) → the rate of the lowest validation loss, in the mean of all seeds where `confirm` has measured them."""
    lines = list(lines)
    known = {**losses_by_rate(lines, first_seed_only=True), **losses_by_rate(lines)}
    return {
        (task, kind): min(losses, key=lambda lr: losses[lr])
        for (task, kind, its_budget), losses in known.items()
        if its_budget == budget
    }


def at_best(lines: Iterable[Cell], task: str, kind: str, budget: float = 0.1) -> tuple[float, list[Cell]]:
    """A method's best rate, and its line for each seed there that was measured."""
    lines = list(lines)
    rate, known = best_rates(lines, budget)[task, kind], {identity(line): line for line in lines}
    wanted = (identity(cell(task, kind, rate, seed, seeded(kind, seed), budget)) for seed in seeds_of(task))
    return rate, [known[name] for name in wanted if name in known]


def recipe_of(wanted: Cell, folder: str) -> Recipe:
    """A cell's run, on one thread."""
    fold = {"data.fold": wanted["seed"]} if wanted["task"] in FOLDS else {}
    settings = {**TASKS[wanted["task"]], **wanted["overrides"], "seed": wanted["seed"], "output": folder, "threads": 1}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in {**settings, **fold}.items()}
    return load_recipe(None, [f"--{key}={text}" for key, text in texts.items()])
