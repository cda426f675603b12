"""Cells of `benchmarks.quality.run`. A cell is one run: task, kind, seed, and overrides of the task's recipe."""

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
"""A task, a kind, and the kind's budget or size as a budget (dense has none: 0.1)."""

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
"""Learning rates of controls. Adam's grid has one more, since `parameter_groups` raises only a bank's. The slowest tasks have
fewer, around the best ones."""
LOW = 0.02
LOW_KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt", "lstm", "digits"), ("shared", "equal", "shallow", *CONTROLS)),
    "wrn": ("shared", *CONTROLS),
    **dict.fromkeys(("vit", "captions"), ("shared", "equal", "shallow", "hashed", "hashed-global")),
}
"""Kinds that exist at 2 %. No dense Wide ResNet is that small, and on small models rank 1 needs more parameters."""
LOW_RATES: dict[tuple[str, str], tuple[float, ...]] = {
    **{("gpt", kind): (*_ADAMW[1:], 4.8e-2) for kind in ("equal", "shallow", "hashed", "hashed-global")},
    ("wrn", "hashed-global"): _SGD[1:],
}
"""Learning rates of controls at 2 % whose best was the last of CONTROL_RATES: one more."""
DEFAULT = "offset:chunk=16"
"""The choice of "auto" below a budget of 1 (with gains for matrices), by name, so that a line says what it measured."""
SEEDS = (0, 1, 2)
TWIN = "dense at "
"""Prefix of a learning rate in `distill.teacher`: a dense run of the task at that learning rate, with the cell's seed."""
FOLDS = {"digits": 10}
"""Number of folds of tasks without a test set: they are cross-validated, and a seed is a fold too."""


def seeds_of(task: str) -> tuple[int, ...]:
    return tuple(range(FOLDS[task])) if task in FOLDS else SEEDS


def cell(
    task: str, kind: str, lr: float, seed: int = 0, more: dict[str, Any] | None = None, budget: float = 0.1
) -> Cell:
    """A cell: `kind` is one of KINDS or CONTROLS, or "shallow"; `more` are overrides of the recipe."""
    small = {"equal": EQUAL, "shallow": SHALLOW}.get(kind)
    overrides: dict[str, Any] = {"model_args": small[budget][task]} if small else {}
    overrides |= {"share.budget": budget, "share.morph": DEFAULT} if kind == "shared" else {}
    overrides |= {"share.budget": budget, "share.control": kind} if kind in CONTROLS else {}
    return {"task": task, "kind": kind, "seed": seed, "overrides": {**overrides, "optimizer.lr": lr, **(more or {})}}


def seeded(kind: str, seed: int) -> dict[str, Any]:
    """Overrides by seed: where a weight reads its bank or its buckets."""
    return {"share.seed": seed} if seed and kind not in ("dense", "equal", "shallow") else {}


def grids() -> Iterator[tuple[Method, tuple[float, ...]]]:
    """Every method, and the learning rates at which it is tried."""
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
    """Cells of these methods at all their learning rates, with one seed."""
    wanted = list(methods)
    for (task, kind, budget), rates in grids():
        if (task, kind, budget) in wanted:
            for lr in rates:
                yield cell(task, kind, lr, budget=budget)


def identity(measured: Cell) -> str:
    return json.dumps({key: measured[key] for key in ("task", "kind", "seed", "overrides")}, sort_keys=True)


def losses_by_rate(lines: Iterable[Cell], first_seed_only: bool = False) -> dict[Method, dict[float, float]]:
    """Method → learning rate → mean validation loss, where all seeds were measured."""
    lines = list(lines)
    measured = {identity(line): line["validation_loss"] for line in lines}
    kinds = {(line["task"], line["kind"]) for line in lines}
    found: dict[Method, dict[float, float]] = {}
    for method, rates in grids():
        task, kind, budget = method
        if (task, kind) not in kinds:
            continue
        seeds = seeds_of(task)[: 1 if first_seed_only else None]
        for lr in rates:
            names = [identity(cell(task, kind, lr, seed, seeded(kind, seed), budget)) for seed in seeds]
            if measured.keys() >= set(names):
                found.setdefault(method, {})[lr] = statistics.mean(measured[name] for name in names)
    return found


def best_rates(lines: Iterable[Cell], budget: float = 0.1) -> dict[tuple[str, str], float]:
    """(task, kind) → learning rate with the lowest validation loss, in the mean of all seeds if `confirm` has measured them."""
    lines = list(lines)
    known = {**losses_by_rate(lines, first_seed_only=True), **losses_by_rate(lines)}
    return {
        (task, kind): min(losses, key=lambda lr: losses[lr])
        for (task, kind, its_budget), losses in known.items()
        if its_budget == budget
    }


def at_best(lines: Iterable[Cell], task: str, kind: str, budget: float = 0.1) -> tuple[float, list[Cell]]:
    """Best learning rate of a method, and its line for each measured seed."""
    known = {identity(line): line for line in lines if (line["task"], line["kind"]) == (task, kind)}
    rate = best_rates(known.values(), budget)[task, kind]
    wanted = (identity(cell(task, kind, rate, seed, seeded(kind, seed), budget)) for seed in seeds_of(task))
    return rate, [known[name] for name in wanted if name in known]


def recipe_of(wanted: Cell, folder: str) -> Recipe:
    """Recipe of a cell's run, on one thread."""
    fold = {"data.fold": wanted["seed"]} if wanted["task"] in FOLDS else {}
    settings = {**TASKS[wanted["task"]], **wanted["overrides"], "seed": wanted["seed"], "output": folder, "threads": 1}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in {**settings, **fold}.items()}
    return load_recipe(None, [f"--{key}={text}" for key, text in texts.items()])
