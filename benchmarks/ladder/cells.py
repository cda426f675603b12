"""Cells of `benchmarks.ladder`. A cell is one simulated run: task, model, way of synchronizing, learning rate, seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.quality.cells import DEFAULT
from benchmarks.quality.tasks import TASKS as RECIPES
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe

Cell = dict[str, Any]
WORKERS = 4
"""Number of simulated workers; the batch of a recipe is that of all of them."""

_LSTM = {"layers": 2, "width": 64, "context": 64}
TASKS: dict[str, dict[str, Any]] = {
    "gpt": {
        **RECIPES["gpt-small"],
        **{"data.path": RECIPES["gpt-python"]["data.path"], "optimizer.name": "adamw", "optimizer.weight_decay": 0.1},
        **{"steps": 1500, "schedule.warmup": 100, "evaluate_every": 500, "evaluate_batches": 100},
    },
    "lstm": {**RECIPES["lstm"], "model_args": _LSTM, "evaluate_batches": 100},
    "wrn": {**RECIPES["wrn"], "model_args": {"depth": 10, "width": 1, "stem_stride": 2}},
    "gpt-128": {
        **RECIPES["gpt-python"],
        **{"steps": 2000, "schedule.warmup": 100, "evaluate_every": 500, "evaluate_batches": 100},
    },
}
"""task → settings of its recipe: those of `benchmarks.quality` at a size at which a cell takes one to two minutes."""
NAMES = {
    "gpt": "GPT, 2 layers of width 64",
    "lstm": "LSTM, 2 layers of width 64",
    "wrn": "Wide ResNet 10-1",
    "gpt-128": "GPT, 4 layers of width 128",
}

SMALL: dict[tuple[str, float], dict[str, Any]] = {
    ("gpt", 0.25): {"layers": 2, "width": 30, "heads": 2, "context": 64},
    ("gpt", 0.1): {"layers": 2, "width": 18, "heads": 2, "context": 64},
    ("gpt-128", 0.25): {"layers": 4, "width": 64, "heads": 4, "context": 128},
    ("lstm", 0.25): {"layers": 2, "width": 27, "context": 64},
    ("lstm", 0.1): {"layers": 2, "width": 15, "context": 64},
    ("wrn", 0.25): {"first": 8, "depth": 10, "stem_stride": 2},
}
"""(task, budget) → `model_args` of a narrower dense model with at least as many parameters as the bank."""
_NARROW = {"wrn": "benchmarks.models.narrow_wide_resnet"}
"""Task → its model with these arguments, where it is another one."""
KINDS = ("dense", "small", "hashed", "bank")
"""Kinds of model. "small" is dense with as many parameters as the budget; "hashed" has one array of buckets for all weights."""

AVERAGE = (1.0, 0.0)
"""Outer learning rate and momentum of plain averaging."""
GAINS = "bf16"
"""Codec of gains in the suites' lines, as `dist_ssn.sync` had it when they were measured; it has four bits since (`gains.py`)."""


def cell(
    task: str,
    kind: str,
    budget: float | None,
    lr: float,
    every: int = 1,
    codec: str = "none",
    outer: tuple[float, float] = AVERAGE,
    seed: int = 0,
    small: str | None = GAINS,
    steps: int | None = None,
) -> Cell:
    """A cell.

    Args:
        task: One of TASKS.
        kind: One of KINDS.
        budget: Share of the weights, of a bank or of what is as large as one; None for "dense".
        lr: Learning rate of the workers' optimizer.
        every: Steps between two exchanges; 1 averages gradients on every step.
        codec: Name of the codec of what is exchanged.
        outer: Learning rate and Nesterov momentum of the outer optimizer; unused with `every=1`.
        seed: Of weights, data and mapping together.
        small: Name of the codec of gains, coefficients, biases and norms, where `codec` has fewer than 16 bits; None: as
            `dist_ssn.sync` has it.
        steps: Number of steps; None: the task's.
    """
    assert kind in KINDS and (budget is None) == (kind == "dense"), (kind, budget)
    made = {"task": task, "kind": kind, "budget": budget, "lr": lr, "every": every, "codec": codec}
    more = {"seed": seed, "small": small, "steps": steps or TASKS[task]["steps"]}
    return {**made, "outer": list(AVERAGE if every == 1 else outer), **more}


_DEFAULTS = cell("gpt", "dense", None, 1.0)


def identity(measured: Mapping[str, Any]) -> str:
    """The text that is equal for equal cells."""
    return json.dumps([measured.get(key, default) for key, default in _DEFAULTS.items()])


def without(wanted: Iterable[Cell], lines: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells that no line has, each once, in their order."""
    done = {identity(line) for line in lines}
    return [one for name, one in {identity(one): one for one in wanted}.items() if name not in done]


def settings_of(wanted: Cell) -> list[str]:
    """Settings of a cell's recipe, as on a command line: its task, its model, its learning rate and its length."""
    task, kind, budget, seed = (wanted[key] for key in ("task", "kind", "budget", "seed"))
    settings = {**TASKS[task], "optimizer.lr": wanted["lr"], "seed": seed, "threads": 1, "steps": wanted["steps"]}
    if kind == "small":
        settings |= {"model": _NARROW.get(task, settings["model"]), "model_args": SMALL[task, budget]}
    elif kind == "hashed":
        settings |= {"share.budget": budget, "share.control": "hashed-global", "share.seed": seed}
    elif kind == "bank":
        settings |= {"share.budget": budget, "share.morph": DEFAULT, "share.seed": seed}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [f"--{key}={text}" for key, text in texts.items()]


def recipe_of(wanted: Cell) -> Recipe:
    """Recipe of a cell."""
    return load_recipe(None, settings_of(wanted))
