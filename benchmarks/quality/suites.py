"""Suites of `benchmarks.quality.run`: a suite is a name and its cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.quality.cells import (
    CONTROL_RATES,
    CONTROLS,
    DEFAULT,
    KINDS,
    LOW,
    LOW_KINDS,
    RATES,
    SEEDS,
    Cell,
    best_rates,
    cell,
    grid,
    identity,
    losses_by_rate,
    seeded,
    seeds_of,
)
from benchmarks.quality.further_suites import decay, distill, further_seeds, larger, longer, prune, target, wider
from benchmarks.quality.tasks import Settings
from benchmarks.result_files import ResultFile

MORPHS: dict[str, tuple[str, ...]] = {
    "gpt": (
        *("offset:chunk=64", "offset:chunk=8", "offset:chunk=16,gains=false", "offset:chunk=16,templates=2"),
        *("offset:chunk=16,rank=4", "hash", "inter", "mask"),
    ),
    "wrn": (
        *("offset:chunk=64", "offset:chunk=9", "offset:chunk=16,gains=true", "offset:chunk=16,templates=2"),
        *("offset:chunk=16,rank=2", "hash", "inter", "mask"),
    ),
}


def rates() -> Iterator[Cell]:
    """Each method over a grid of learning rates of factor 2, with one seed."""
    yield from grid((task, kind, 0.1) for task in RATES for kind in KINDS)


def controls() -> Iterator[Cell]:
    """Each control over its own grid of learning rates, with one seed; `confirm` adds further seeds."""
    kinds = (*CONTROLS, "shallow")
    yield from grid((task, kind, 0.1) for task in CONTROL_RATES for kind in kinds)


def low() -> Iterator[Cell]:
    """Banks of 2 % and all controls of that size, as `rates` and `controls`."""
    yield from grid((task, kind, LOW) for task, kinds in LOW_KINDS.items() for kind in kinds)


def confirm() -> Iterator[Cell]:
    """All seeds (of weights, data and mapping together) at each method's two best learning rates.

    Tied and low-rank models, which are far behind everywhere, run at their best one only.
    """
    lines = ResultFile("quality").lines()
    for (task, kind, budget), losses in losses_by_rate(lines, first_seed_only=True).items():
        for lr in sorted(losses, key=lambda lr: losses[lr])[: 1 if kind in ("tied", "lowrank") else 2]:
            for seed in seeds_of(task)[1:]:
                yield cell(task, kind, lr, seed, seeded(kind, seed), budget)


MORPHS_AT: dict[str, Settings] = {
    "gpt": {"optimizer.lr": 3e-3},
    "wrn": {"optimizer.lr": 0.2, "share.mapping": "scale"},
}
"""task → the best learning rate, and a former default mapping, at which the morphs were compared."""


def morphs() -> Iterator[Cell]:
    """Every morph at 10 % over seeds of its mapping, and the default morph over mappings."""
    for task, names in MORPHS.items():
        lr = MORPHS_AT[task]["optimizer.lr"]
        for seed in SEEDS[:2]:
            for morph in (DEFAULT, *names):
                more = {**MORPHS_AT[task], "share.morph": morph, **({"share.seed": seed} if seed else {})}
                yield cell(task, "shared", lr, more=more)
        for mapping in ("shape", "depth:2"):
            yield cell(task, "shared", lr, more={"share.mapping": mapping})


def budgets() -> Iterator[Cell]:
    """Every budget over learning rates, for AdamW and SGD, with three seeds."""
    for optimizer, rates in {"adamw": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "sgd": (0.05, 0.1, 0.2, 0.4, 0.8)}.items():
        for budget in (None, 0.02, 0.1, 0.5, 1.0):
            shared = {"share.budget": budget, "share.morph": "auto"} if budget else {}
            for lr in (*rates, 6.4e-2) if (optimizer, budget) == ("adamw", 0.02) else rates:
                for seed in SEEDS:
                    yield cell("gpt-small", "budgets", lr, seed, {"optimizer.name": optimizer, **shared})


CURVE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
COARSE = {0.01, 0.05, 0.25, 1.0, 4.0}
"""Budgets that are skipped on tasks whose runs take half a minute and more."""
SLOW = ("gpt", "wrn", "vit", "captions")


def curve() -> Iterator[Cell]:
    """Budgets from half a percent to eight times the weights, at the best learning rates of the 10 % bank and of dense.

    Where both are the same, its neighbours are added.
    """
    best = best_rates(ResultFile("quality").lines())
    for task in RATES:
        if not {(task, "shared"), (task, "dense")} <= best.keys():
            continue
        tried = {best[task, "shared"], best[task, "dense"]}
        tried |= {factor * lr for lr in tried for factor in (0.5, 2)} if len(tried) == 1 else set()
        budgets = [budget for budget in CURVE if task not in SLOW or budget not in COARSE]
        for budget, lr in itertools.product(budgets, sorted(tried)):
            yield on_curve(task, budget, lr, seed=0)


def on_curve(task: str, budget: float, lr: float, seed: int, mapping: str | None = None) -> Cell:
    """A cell of the curve; a mapping means an earlier default."""
    more = {"share.morph": DEFAULT if budget < 1 else "auto", **({"share.mapping": mapping} if mapping else {})}
    return cell(task, "shared", lr, seed, {**more, **seeded("shared", seed)}, budget)


def curve_confirm() -> Iterator[Cell]:
    """All seeds of the curve, at each budget's better learning rate."""
    measured = {identity(line): line["validation_loss"] for line in ResultFile("quality").lines()}
    best: dict[tuple[str, float], Cell] = {}
    for one in curve():
        key = one["task"], one["overrides"]["share.budget"]
        if identity(one) in measured and (key not in best or measured[identity(one)] < measured[identity(best[key])]):
            best[key] = one
    for (task, budget), one in best.items():
        for seed in seeds_of(task)[1:]:
            yield on_curve(task, budget, one["overrides"]["optimizer.lr"], seed)


SUITES: dict[str, Callable[[], Iterator[Cell]]] = {
    "rates": rates,
    "controls": controls,
    "low": low,
    "confirm": confirm,
    "curve": curve,
    "curve-confirm": curve_confirm,
    "morphs": morphs,
    "budgets": budgets,
    "distill": distill,
    "prune": prune,
    "decay": decay,
    "longer": longer,
    "larger": larger,
    "larger-confirm": partial(further_seeds, larger),
    "wider": wider,
    "target": target,
    "target-confirm": partial(further_seeds, target),
}
