"""What a recipe costs on a cluster, in tables: `dist-ssn plan --cluster`."""

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

WAYS = ("none", "depth:2", "depth:4", "segments:4", "sums:2", "delay")
"""Values of `engine.overlap`, and of `share.mapping` (depth:N)."""


def per_node(cluster: Cluster) -> int:
    if isinstance(cluster.processes_per_node, int):
        return cluster.processes_per_node
    return max(1, torch.cuda.device_count())


def measure_for(
    recipe: Recipe, cluster: Cluster, steps: int = 20, known: Path | None = None, keep: Path | None = None
) -> Measured | None:
    """Both sides of a recipe for a cluster; None on ranks other than 0.

    Compute is measured here, alone or on as many processes as the cluster has, or taken from `known`; `keep`: where to write it.

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


def compare_ways(measured: Measured, fabric: Fabric, asked: str = "none") -> dict[str, Exposure]:
    """What a step costs, dense and by each way: {"dense": …, "none": …}; `asked`: one more way."""
    plan = measured.shared.plan
    assert plan is not None
    found = {"dense": measured.dense.step(fabric)}
    for way in WAYS if asked in WAYS else (*WAYS, asked):
        if way.startswith("depth"):
            there: Plan = make_plan(measured.specs, plan.budget, mapping=way, seed=plan.seed)
            found[way] = measured.shared.step(fabric, Overlap(), there)
        else:
            found[way] = measured.shared.step(fabric, parse_overlap(way))
    return found


def rows_of(found: dict[str, Exposure]) -> list[dict[str, Any]]:
    """As plain data: milliseconds and bytes per step."""
    return [
        {
            "way": way,
            "rounds": cost.rounds,
            "bytes_per_step_logical": cost.payload,
            "exposed_ms_per_step": 1000 * cost.exposed,
            "ms_per_step": 1000 * cost.step,
        }
        for way, cost in found.items()
    ]


def table_of(rows: Sequence[dict[str, Any]], cluster: Cluster) -> Table:
    """For the terminal; the fastest way is marked."""
    exact = [row for row in rows if row["way"] != "delay"]  # which trains on old gradients
    best = min(exact, key=lambda row: row["ms_per_step"])
    table = Table("way", "rounds", "MB sent", "exposed ms", "step ms", title=f"A step on {cluster.name}, predicted")
    for row in rows:
        numbers = (
            f"{row['bytes_per_step_logical'] / 1e6:.3f}",
            f"{row['exposed_ms_per_step']:.1f}",
            f"{row['ms_per_step']:.1f}",
        )
        table.add_row(row["way"] + (" ←" if row is best else ""), str(row["rounds"]), *numbers)
    return table


def workers_of(measured: Measured, cluster: Cluster, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A step on so many processes, each with its own batch as measured: milliseconds, and the share that is compute."""
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
    """What each engine sends in a step and keeps on a process, dense and shared."""
    rows = []
    for engine in HALVES:
        row: dict[str, Any] = {"engine": engine}
        for name, side in (("dense", measured.dense), ("shared", measured.shared)):
            one = footprint(engine, side.numbers, fabric, moments)
            row |= {
                f"{name}_wire_bytes": one.wire_bytes,
                f"{name}_seconds": one.seconds,
                f"{name}_kept_bytes": one.kept,
            }
        rows.append(row)
    return rows


def engines_table(rows: Sequence[dict[str, Any]], processes: int) -> Table:
    title = f"Per process and step, on {processes} processes: sent, time on the network, kept (parameters, gradient, optimizer)"
    table = Table("engine", title=title)
    for side in ("dense", "shared"):
        for what in ("MB sent", "ms", "MB kept"):
            table.add_column(f"{side}: {what}", justify="right")
    for row in rows:
        cells = []
        for side in ("dense", "shared"):
            numbers = row[f"{side}_wire_bytes"] / 1e6, 1000 * row[f"{side}_seconds"], row[f"{side}_kept_bytes"] / 1e6
            cells += [f"{numbers[0]:,.3f}", f"{numbers[1]:,.1f}", f"{numbers[2]:,.2f}"]
        table.add_row(row["engine"], *cells)
    return table
