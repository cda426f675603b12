"""`dist-ssn plan --cluster=FILE`: what a recipe costs on a cluster, as tables and sentences, or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from dist_ssn.cluster import load_cluster
from dist_ssn.cost import ways
from dist_ssn.cost.advice import advise, sentences
from dist_ssn.cost.fabric import fabric_of
from dist_ssn.errors import RecipeError
from dist_ssn.train.recipe.schema import Recipe

MOST_WORKERS = 2**20


def show(recipe: Recipe, name: str, options: Mapping[str, str | None], as_json: bool) -> None:
    """Prints it, on rank 0.

    Args:
        name: of a cluster, or its file
        options: --workers, --compute and --calibrate; None where they were not given

    Raises:
        UserError: the cluster, the recipe or an option is wrong.
    """
    cluster, counts = load_cluster(name), _workers(options["--workers"])
    known, keep = (None if options[key] is None else Path(str(options[key])) for key in ("--compute", "--calibrate"))
    measured = ways.measure_for(recipe, cluster, known=known, keep=keep)
    if measured is None:
        return
    per_node = ways.per_node(cluster)
    fabric = fabric_of(cluster, cluster.nodes * per_node, per_node)
    costs = ways.rows_of(ways.compare_ways(measured, fabric, recipe.engine.overlap))
    workers = ways.workers_of(measured, cluster, counts)
    engines = ways.engines_of(measured, fabric, moments=2 if recipe.optimizer.name == "adamw" else 1)
    advice = advise(measured, fabric)
    compute = {"dense_ms": 1000 * measured.dense.compute, "shared_ms": 1000 * measured.shared.compute}
    if as_json:
        crossover = advice.crossover_mbit if math.isfinite(advice.crossover_mbit) else None
        told = {**vars(advice), "crossover_mbit": crossover}
        print(json.dumps({"compute": compute, "ways": costs, "workers": workers, "engines": engines, "advice": told}))
        return
    console = Console()
    console.print(ways.table_of(costs, cluster))
    if workers:
        console.print(ways.workers_table(workers))
    console.print(ways.engines_table(engines, fabric.processes))
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


def _workers(text: str | None) -> list[int]:
    """Numbers of processes, as in 2,8,64."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= MOST_WORKERS for word in words):
        raise RecipeError(
            f"command line: --workers must be numbers from 1 to {MOST_WORKERS}, as in 2,8,64, got {text!r}"
        )
    return [int(word) for word in words]
