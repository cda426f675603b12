"""Further suites of `benchmarks.quality.run`: a teacher, pruning, decay, wider and larger models, longer runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.quality.cells import LOW, SEEDS, TWIN, Cell, best_rates, cell, identity, seeded, seeds_of
from benchmarks.quality.tasks import TASKS, WIDER, Settings
from benchmarks.result_files import ResultFile
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import make_plan
from dist_ssn.train.data import data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.sections import DataConfig

OPTION_TASKS = ("digits", "lstm")
"""Tasks of the suites for a teacher, pruning and decay: they are quick, and a teacher makes a run 2.5 times as long."""
HIDDEN = {"digits": ["[246]"]}
"""task → modules whose hidden states are taught too: those after each hidden layer."""
TEACHERS: dict[str, dict[str, Any]] = {
    "none": {},
    "half": {"distill.weight": 0.5},
    "most": {"distill.weight": 0.9},
    "half, hidden": {"distill.weight": 0.5},
}
"""Option → overrides: the teacher's part of the loss, and hidden states."""


def distill() -> Iterator[Cell]:
    """Banks with and without their dense twin as a teacher, each at its own best learning rate."""
    best = best_rates(ResultFile("quality").lines())
    for task in OPTION_TASKS:
        if not {(task, "shared"), (task, "dense")} <= best.keys():
            continue
        for seed, budget, name in itertools.product(seeds_of(task), (0.1, 0.02), TEACHERS):
            hidden = {"distill.hidden": HIDDEN[task]} if "hidden" in name and task in HIDDEN else {}
            if hidden or "hidden" not in name:
                twin = {"distill.teacher": f"{TWIN}{best[task, 'dense']}"} if name != "none" else {}
                more = {**twin, **TEACHERS[name], **hidden, **seeded("shared", seed)}
                yield {**cell(task, "shared", best[task, "shared"], seed, more, budget), "way": name}


def widened(task: str) -> Settings:
    """Overrides for a wider model with as many parameters as the usual one at 10 %."""
    sizes = WIDER[task]
    hints = data_hints(DataConfig(name=TASKS[task]["data.name"]), context=sizes.get("context"))
    usual, wide = (
        find_specs(build_model(TASKS[task]["model"], arguments, hints))
        for arguments in (TASKS[task]["model_args"], sizes)
    )
    budget = make_plan(usual, 0.1).parameters + usual.own_parameters - wide.own_parameters
    return {"model_args": sizes, "share.budget": budget}


def wider(tasks: Iterable[str] = tuple(WIDER)) -> Iterator[Cell]:
    """Wider models with as few parameters: the same bytes and more compute.

    At the usual bank's best learning rate and half of it, all seeds.
    """
    best = best_rates(ResultFile("quality").lines())
    for task in (task for task in tasks if task in WIDER):
        for factor, seed in itertools.product((0.5, 1) if (task, "shared") in best else (), seeds_of(task)):
            more = {**widened(task), **seeded("shared", seed)}
            yield cell(task, "shared", factor * best[task, "shared"], seed, more)


LONGER: dict[str, tuple[tuple[str, float, tuple[float, ...]], ...]] = {
    "gpt": (
        ("dense", 0.1, (3e-3, 6e-3)),
        ("shared", 0.1, (1.5e-3, 3e-3, 6e-3)),
        ("equal", 0.1, (6e-3, 1.2e-2)),
        ("shared", 0.25, (3e-3,)),
        ("shared", 0.5, (3e-3,)),
        ("wider", 0.1, (3e-3,)),
    ),
    "gpt-python": (
        ("dense", 0.1, (3e-3, 6e-3)),
        ("shared", 0.1, (3e-3, 6e-3)),
        ("equal", 0.1, (1.2e-2,)),
        ("shared", 0.25, (3e-3,)),
    ),
    "lstm": (
        ("dense", 0.1, (1.2e-2, 2.4e-2, 4.8e-2)),
        ("equal", 0.1, (1.2e-2, 2.4e-2, 4.8e-2)),
        *(("shared", budget, (3e-3, 6e-3, 1.2e-2)) for budget in (0.1, 0.25, 0.5)),
    ),
}
"""task → kind (or "wider", for a bank), budget, learning rates around the best ones of the usual run."""


def longer() -> Iterator[Cell]:
    """Runs of four times the steps, with one seed."""
    for task, sides in LONGER.items():
        for kind, budget, rates in sides:
            wide = widened(task) if kind == "wider" else {}
            for lr in rates:
                more = {**wide, "steps": 4 * TASKS[task]["steps"]}
                yield cell(task, "shared" if wide else kind, lr, more=more, budget=budget)


LARGER: dict[str, dict[str, tuple[float, ...]]] = {
    "gpt-large": {"dense": (7.5e-4, 1.5e-3, 3e-3), "shared": (1.5e-3, 3e-3), "equal": (6e-3, 1.2e-2)},
    "lstm-large": {
        **{"dense": (3e-3, 6e-3, 1.2e-2, 2.4e-2), "shared": (1.5e-3, 3e-3, 6e-3)},
        **{"equal": (1.2e-2, 2.4e-2, 4.8e-2), "hashed": (1.2e-2, 2.4e-2, 4.8e-2)},
    },
}
"""task → kind → learning rates, from about the usual model's best one down: wider models need lower ones."""


def larger(seeds: tuple[int, ...] = SEEDS[:1]) -> Iterator[Cell]:
    """Models of ten times the weights, at 10 %: one seed over the learning rates."""
    for (task, sides), seed in itertools.product(LARGER.items(), seeds):
        for kind, rates in sides.items():
            for lr in rates:
                yield cell(task, kind, lr, seed, seeded(kind, seed))


DECAYED = ("dense", "shared", "hashed", "hashed-global", "shallow")
"""Dense, and kinds that are the best of their size on some task."""
DECAYS = (0.025, 0.4, 1.6)
"""Weight decays that are tried beside the usual 0.1."""


def decay() -> Iterator[Cell]:
    """Methods with other weight decays (the learning rate multiplies the decay): best learning rates, all seeds."""
    lines = ResultFile("quality").lines()
    for budget, tasks, kinds in ((0.1, OPTION_TASKS, DECAYED), (LOW, ("lstm",), ("shared", "hashed"))):
        best = best_rates(lines, budget)
        for task, kind, value in itertools.product(tasks, kinds, DECAYS):
            for seed in seeds_of(task) if (task, kind) in best else ():
                more = {"optimizer.weight_decay": value, **seeded(kind, seed)}
                yield cell(task, kind, best[task, kind], seed, more, budget)


PRUNED: dict[str, tuple[str, float, dict[str, Any]]] = {
    "10 %": ("shared", 0.1, {}),
    "20 %, half of its bank": ("shared", 0.2, {"prune.final": 0.5}),
    "5 %": ("shared", 0.05, {}),
    "10 %, half of its bank": ("shared", 0.1, {"prune.final": 0.5}),
    "10 %, half of its weights": ("shared", 0.1, {"prune.final": 0.5, "prune.what": "weights"}),
    "10 %, 90 % of its weights": ("shared", 0.1, {"prune.final": 0.9, "prune.what": "weights"}),
    "dense, 90 % of its weights": ("dense", 0.1, {"prune.final": 0.9, "prune.what": "weights"}),
}
"""Pruning option → kind, budget, settings (pruning ends after three quarters of the run)."""


def prune() -> Iterator[Cell]:
    """Models pruned during training, beside banks that are as small from the start, at each kind's best learning rate."""
    best = best_rates(ResultFile("quality").lines())
    for task in OPTION_TASKS:
        for seed, (name, (kind, budget, settings)) in itertools.product(seeds_of(task), PRUNED.items()):
            if (task, kind) in best:
                end = {"prune.end": TASKS[task]["steps"] * 3 // 4} if "prune.final" in settings else {}
                more = {**settings, **end, **seeded(kind, seed)}
                yield {**cell(task, kind, best[task, kind], seed, more, budget), "way": name}


Side = str | float
"""Kind of a dense model, or budget of a shared one."""
TARGETS: dict[str, dict[Side, tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "gpt": {
        "dense": ((500,), (6e-3,)),
        "equal": ((500, 1000, 2000), (1.2e-2,)),
        **{budget: ((350, 500), (3e-3, 6e-3)) for budget in (0.1, 0.25, 0.5)},
        0.05: ((500, 1000), (3e-3, 6e-3)),
        0.02: ((500, 1000, 2000), (3e-3, 6e-3)),
    },
    "gpt-wide": {
        "dense": ((1500,), (1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3)),
        "equal": ((1500, 2000, 3000), (7.5e-4, 1.5e-3, 3e-3)),
        0.5: ((1250, 1500), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.25: ((1250, 1500), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.1: ((1000, 1250, 1500), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.05: ((1250, 1500, 2000), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.02: ((1500, 2000, 3000), (3.75e-4, 7.5e-4, 1.5e-3)),
    },
}
"""task → side → steps of runs that may reach dense's final loss, and learning rates for each."""


def target(seeds: tuple[int, ...] = SEEDS[:1]) -> Iterator[Cell]:
    """Runs of several lengths, each with its own schedule: one seed over the learning rates."""
    for (task, sides), seed in itertools.product(TARGETS.items(), seeds):
        every = 50 if task == "gpt" else TASKS[task]["evaluate_every"]
        for side, (lengths, rates) in sides.items():
            kind = side if isinstance(side, str) else "shared"
            for steps, lr in itertools.product(lengths, rates):
                more: dict[str, Any] = {"steps": steps, "evaluate_every": every}
                more |= {} if isinstance(side, str) else {"share.budget": side, **seeded("shared", seed)}
                yield cell(task, kind, lr, seed, more)


def further_seeds(suite: Callable[[tuple[int, ...]], Iterator[Cell]]) -> Iterator[Cell]:
    """Other seeds of a suite, at the best learning rate of the first seed if that was measured."""
    measured = {identity(line): line for line in ResultFile("quality").lines()}
    best: dict[str, Cell] = {}
    for one in suite(SEEDS[:1]):
        line = measured.get(identity(one))
        name = identity({**one, "overrides": {**one["overrides"], "optimizer.lr": None}})
        if line is not None and (name not in best or line["validation_loss"] < best[name]["validation_loss"]):
            best[name] = line
    chosen = {identity(line) for line in best.values()}
    for one in suite(SEEDS[1:]):
        first = {key: value for key, value in one["overrides"].items() if key != "share.seed"}
        if identity({**one, "seed": SEEDS[0], "overrides": first}) in chosen:
            yield one
