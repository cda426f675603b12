"""Cost of a recipe on a cluster, with its alternatives, in tables: `dist-ssn plan --cluster`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dist_ssn.cluster import Cluster
from dist_ssn.cost.engines import HALVES, footprint
from dist_ssn.cost.fabric import Fabric, fabric_of
from dist_ssn.cost.measured import Measured, measure, save
from dist_ssn.cost.overlap import Exposure
from dist_ssn.engines import init_world
from dist_ssn.errors import UserError
from dist_ssn.plan import Plan, make_plan
from dist_ssn.plan.overlap import Overlap, parse_overlap
from dist_ssn.train.recipe.schema import Recipe

ALTERNATIVES = ("none", "depth:2", "depth:4", "segments:4", "sums:2", "delay")
"""Values of `engine.overlap`, and of `share.mapping` (depth:N)."""


def per_node(cluster: Cluster) -> int:
    """Processes per node: the cluster's number, or one for each GPU of this machine."""
    if isinstance(cluster.processes_per_node, int):
        return cluster.processes_per_node
    return max(1, torch.cuda.device_count())


def measure_for(
    recipe: Recipe, cluster: Cluster, steps: int = 20, known: Path | None = None, keep: Path | None = None
) -> Measured | None:
    """Measured compute of both sides of a recipe, for a cluster; None on ranks other than 0.

    Compute is measured on this machine, with one process or as many as the cluster has, or read from `known`.

    Args:
        recipe: a shared one.
        cluster: gives the number of processes.
        steps: number of measured steps.
        known: a file with measured compute.
        keep: file to write the measured compute to.

    Raises:
        UserError: the recipe is dense, cannot be built, or another number of processes was started.
    """
    with init_world() as world:
        processes = cluster.nodes * per_node(cluster)
        if world.world_size not in (1, processes):
            raise UserError(
                f"the cluster {cluster.name} has {processes} processes, and {world.world_size} were started: "
                f"start one, or {processes}"
            )
        found = measure(recipe, dataclasses.replace(world, world_size=processes), steps, known)
        if world.rank == 0 and keep is not None:
            save(found, recipe, keep)
        return found if world.rank == 0 else None


def compare_alternatives(measured: Measured, fabric: Fabric, own: str = "none") -> dict[str, Exposure]:
    """Cost of a step, dense and by each alternative: {"dense": …, "none": …}.

    Args:
        measured: both sides of a recipe.
        fabric: the processes and their links.
        own: the recipe's own overlap setting, added if it is not among ALTERNATIVES.
    """
    plan = measured.shared.plan
    assert plan is not None
    found = {"dense": measured.dense.step(fabric)}
    for name in ALTERNATIVES if own in ALTERNATIVES else (*ALTERNATIVES, own):
        if name.startswith("depth"):
            there: Plan = make_plan(measured.specs, plan.budget, mapping=name, seed=plan.seed)
            found[name] = measured.shared.step(fabric, Overlap(), there)
        else:
            found[name] = measured.shared.step(fabric, parse_overlap(name))
    return found


def rows_of(found: dict[str, Exposure]) -> list[dict[str, Any]]:
    """The costs as plain data: milliseconds and bytes per step."""
    return [
        {
            "way": name,
            "rounds": cost.rounds,
            "bytes_per_step_logical": cost.payload,
            "exposed_ms_per_step": 1000 * cost.exposed,
            "ms_per_step": 1000 * cost.step,
        }
        for name, cost in found.items()
    ]


def table_of(rows: Sequence[dict[str, Any]], cluster: Cluster) -> Table:
    """The costs as a table for the terminal; the fastest exact alternative is marked."""
    exact = [row for row in rows if row["way"] != "delay"]  # delay trains on old gradients
    best = min(exact, key=lambda row: row["ms_per_step"])
    table = Table("overlap", "rounds", "MB sent", "exposed ms", "step ms", title=f"A step on {cluster.name}, predicted")
    for row in rows:
        figures = (
            f"{row['bytes_per_step_logical'] / 1e6:.3f}",
            f"{row['exposed_ms_per_step']:.1f}",
            f"{row['ms_per_step']:.1f}",
        )
        table.add_row(row["way"] + (" ←" if row is best else ""), str(row["rounds"]), *figures)
    return table


def workers_of(measured: Measured, cluster: Cluster, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A step on each number of processes, with the measured batch on each: milliseconds, and the fraction that is compute."""
    rows = []
    for processes in counts:
        fabric = fabric_of(cluster, processes, per_node(cluster))
        row: dict[str, Any] = {"processes": processes, "nodes": fabric.nodes}
        for name, side in (("dense", measured.dense), ("shared", measured.shared)):
            step = side.step(fabric).step
            row |= {f"{name}_ms_per_step": 1000 * step, f"{name}_efficiency": side.compute / step}
        rows.append(row)
    return rows


def workers_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `workers_of` as a table for the terminal."""
    columns = ["processes", "nodes", "dense ms", "compute", "shared ms", "compute", "dense / shared"]
    table = Table(*columns, title="The same work per process, on more of them")
    for row in rows:
        dense, shared = row["dense_ms_per_step"], row["shared_ms_per_step"]
        table.add_row(
            *(f"{row['processes']:,}", f"{row['nodes']:,}"),
            *(f"{dense:,.1f}", f"{row['dense_efficiency']:.0%}", f"{shared:,.1f}", f"{row['shared_efficiency']:.0%}"),
            f"{dense / shared:.2f}",
        )
    return table


def engines_of(measured: Measured, fabric: Fabric, moments: int) -> list[dict[str, Any]]:
    """Bytes that each engine sends in a step and keeps on a process, dense and shared."""
    rows = []
    for engine in HALVES:
        row: dict[str, Any] = {"engine": engine}
        for name, side in (("dense", measured.dense), ("shared", measured.shared)):
            one = footprint(engine, side.parameters, fabric, moments)
            row |= {
                f"{name}_wire_bytes": one.wire_bytes,
                f"{name}_seconds": one.seconds,
                f"{name}_kept_bytes": one.kept,
            }
        rows.append(row)
    return rows


def engines_table(rows: Sequence[dict[str, Any]], processes: int) -> Table:
    """The rows of `engines_of` as a table for the terminal."""
    title = f"Per process and step, on {processes} processes: sent, time on the network, kept (parameters, gradient, optimizer)"
    table = Table("engine", title=title)
    for side in ("dense", "shared"):
        for quantity in ("MB sent", "ms", "MB kept"):
            table.add_column(f"{side}: {quantity}", justify="right")
    for row in rows:
        cells = []
        for side in ("dense", "shared"):
            sent, seconds, kept = (row[f"{side}_{key}"] for key in ("wire_bytes", "seconds", "kept_bytes"))
            cells += [f"{sent / 1e6:,.3f}", f"{1000 * seconds:,.1f}", f"{kept / 1e6:,.2f}"]
        table.add_row(row["engine"], *cells)
    return table
