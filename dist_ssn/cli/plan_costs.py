"""Costs of a recipe on a cluster, as tables and sentences, or as JSON: `dist-ssn plan --cluster=FILE`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_ssn.cluster import Cluster, load_cluster
from dist_ssn.cost import alternatives, ladder_table
from dist_ssn.cost.advice import advise, sentences
from dist_ssn.cost.fabric import fabric_of
from dist_ssn.cost.ladder import ladder_of
from dist_ssn.cost.measured import Side
from dist_ssn.errors import RecipeError
from dist_ssn.train.limit import within_limit
from dist_ssn.train.recipe.schema import Recipe


def show(recipe: Recipe, given: argparse.Namespace) -> None:
    """Prints the costs, on rank 0.

    Args:
        recipe: its model and batch size are what is costed, with what its sync.limit chooses.
        given: cluster, workers, compute, calibrate and json, as `dist-ssn plan` read them.

    Raises:
        UserError: the cluster, the recipe or an option is wrong.
    """
    cluster = load_cluster(given.cluster)
    recipe, chosen = _within_limit(recipe, cluster)
    known, keep = (None if path is None else Path(path) for path in (given.compute, given.calibrate))
    measured = alternatives.measure_for(recipe, cluster, known=known, keep=keep)
    if measured is None:
        return
    per_node = alternatives.per_node(cluster)
    fabric = fabric_of(cluster, cluster.nodes * per_node, per_node)
    costs = alternatives.rows_of(alternatives.compare_alternatives(measured, fabric, recipe.engine.overlap))
    workers = alternatives.workers_of(measured, cluster, given.workers or [])
    engines = alternatives.engines_of(measured, fabric, moments=2 if recipe.optimizer.name == "adamw" else 1)
    own = ladder_table.own_rungs(recipe)
    ladder = ladder_table.rows_of(ladder_of(measured, fabric, own), recipe.model)
    advice = advise(measured, fabric)
    sides = {"dense": measured.dense, "shared": measured.shared}
    compute: dict[str, Any] = {f"{name}_ms": 1000 * side.compute for name, side in sides.items()}
    compute |= {f"{name}_ms_spread": [1000 * seconds for seconds in side.spread] for name, side in sides.items()}
    doubts = _doubts(sides, known)
    if given.json:
        if doubts:
            print(f"dist-ssn: {doubts}", file=sys.stderr)
        crossover = advice.crossover_mbit if math.isfinite(advice.crossover_mbit) else None
        advised = {**vars(advice), "crossover_mbit": crossover}
        said = {"compute": compute, "ways": costs, "workers": workers, "engines": engines, "advice": advised}
        said |= {"ladder": ladder, "chosen": chosen}
        print(json.dumps(said))
        return
    console = Console()
    console.print(alternatives.table_of(costs, cluster))
    if workers:
        console.print(alternatives.workers_table(workers))
    console.print(alternatives.engines_table(engines, fabric.processes))
    console.print(ladder_table.ladder_table(ladder_table.best_of(ladder), ladder, cluster))
    whence = "measured here" if known is None else f"from {known}"
    times = ", ".join(f"{1000 * side.compute:,.1f} ms {name} ({_range(side)})" for name, side in sides.items())
    first = f"Compute of a step, {whence}: {times}; in brackets, quick and slow steps."
    dense, shared = (recipe.steps * side.step(fabric).step for side in (measured.dense, measured.shared))
    last = f"{recipe.steps:,} steps take {_duration(dense)} dense, {_duration(shared)} shared."
    for sentence in (
        *chosen,
        first,
        *([doubts] if doubts else []),
        *sentences(advice, fabric),
        last,
        ladder_table.limits(recipe.model),
    ):
        console.print(sentence, markup=False, highlight=False)


def _within_limit(recipe: Recipe, cluster: Cluster) -> tuple[Recipe, list[str]]:
    """The recipe with what its sync.limit chooses for a cluster's processes, and the sentences of `dist-ssn train` about it.

    Raises:
        RecipeError: nothing keeps the limit, or it chooses the dense model, beside which there is nothing to cost.
    """
    recipe, chosen = within_limit(recipe, cluster.nodes * alternatives.per_node(cluster))
    if chosen and recipe.share.budget is None and recipe.share.plan is None:
        raise RecipeError(
            f"{chosen[0]}; the costs compare the dense model with a shared one: add a share.budget, such as --share.budget=10%"
        )
    return recipe, chosen


def _range(side: Side) -> str:
    low, high = side.spread
    return f"{1000 * low:,.1f} to {1000 * high:,.1f}"


def _doubts(sides: dict[str, Side], known: Path | None) -> str | None:
    """A warning if the measured repetitions disagree; None if they agree."""
    worst = {name: _range(side) for name, side in sides.items() if side.disagrees}
    if not worst:
        return None
    where = "this machine was busy" if known is None else f"the machine of {known} was busy"
    found = ", ".join(f"{name} {text} ms" for name, text in worst.items())
    return (
        f"Warning: the repetitions of a step disagree ({found}), probably because {where}, so every time and bandwidth here may "
        "be far off: measure again while nothing else runs."
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
