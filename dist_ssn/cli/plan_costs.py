"""Costs of a recipe on a cluster, as tables and sentences, or as JSON: `dist-ssn plan --cluster=FILE`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rich.console import Console

from dist_ssn.cluster import load_cluster
from dist_ssn.cost import alternatives
from dist_ssn.cost.advice import advise, sentences
from dist_ssn.cost.fabric import fabric_of
from dist_ssn.train.recipe.schema import Recipe


def show(recipe: Recipe, given: argparse.Namespace) -> None:
    """Prints the costs, on rank 0.

    Args:
        recipe: its model and batch size are what is costed
        given: cluster, workers, compute, calibrate and json, as `dist-ssn plan` read them

    Raises:
        UserError: the cluster, the recipe or an option is wrong.
    """
    cluster = load_cluster(given.cluster)
    known, keep = (None if path is None else Path(path) for path in (given.compute, given.calibrate))
    measured = alternatives.measure_for(recipe, cluster, known=known, keep=keep)
    if measured is None:
        return
    per_node = alternatives.per_node(cluster)
    fabric = fabric_of(cluster, cluster.nodes * per_node, per_node)
    costs = alternatives.rows_of(alternatives.compare_alternatives(measured, fabric, recipe.engine.overlap))
    workers = alternatives.workers_of(measured, cluster, given.workers or [])
    engines = alternatives.engines_of(measured, fabric, moments=2 if recipe.optimizer.name == "adamw" else 1)
    advice = advise(measured, fabric)
    compute = {"dense_ms": 1000 * measured.dense.compute, "shared_ms": 1000 * measured.shared.compute}
    if given.json:
        crossover = advice.crossover_mbit if math.isfinite(advice.crossover_mbit) else None
        advised = {**vars(advice), "crossover_mbit": crossover}
        said = {"compute": compute, "ways": costs, "workers": workers, "engines": engines, "advice": advised}
        print(json.dumps(said))
        return
    console = Console()
    console.print(alternatives.table_of(costs, cluster))
    if workers:
        console.print(alternatives.workers_table(workers))
    console.print(alternatives.engines_table(engines, fabric.processes))
    whence = "measured here" if known is None else f"from {known}"
    first = f"Compute of a step, {whence}: {compute['dense_ms']:,.1f} ms dense, {compute['shared_ms']:,.1f} ms shared."
    dense, shared = (recipe.steps * side.step(fabric).step for side in (measured.dense, measured.shared))
    last = f"{recipe.steps:,} steps take {_duration(dense)} dense, {_duration(shared)} shared."
    for sentence in (first, *sentences(advice, fabric), last):
        console.print(sentence, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
