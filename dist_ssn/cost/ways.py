"""Every way to overlap communication, side by side, for a recipe on a cluster: `dist-ssn plan --cluster`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn

from dist_ssn.cluster import Cluster
from dist_ssn.cost.overlap import Exposure, messages_of, predict
from dist_ssn.cost.timeline import Timeline, measure_timeline
from dist_ssn.engines import World, init_world
from dist_ssn.errors import UserError
from dist_ssn.plan import Plan, make_plan
from dist_ssn.plan.overlap import Overlap, parse_overlap
from dist_ssn.share import shared_plan
from dist_ssn.specs import Specs, find_specs
from dist_ssn.train.build import build
from dist_ssn.train.optim import build_optimizer
from dist_ssn.train.recipe import Recipe

WAYS = ("none", "depth:2", "depth:4", "segments:4", "sums:2", "delay")
"""Values of `engine.overlap`, and of `share.mapping` (depth:N)."""


def compare_ways(recipe: Recipe, cluster: Cluster, steps: int = 20) -> dict[str, Exposure] | None:
    """What a step of `recipe` costs on `cluster`, dense and by each way: {"dense": …, "none": …}; None on ranks other than 0.

    Compute is measured here, alone or on as many processes as the cluster has; the network is taken from the cluster's facts.

    Raises:
        UserError: the recipe is dense, cannot be built, or another number of processes was started.
    """
    if recipe.share.budget is None and recipe.share.plan is None:
        raise UserError(
            "share.budget is null, which leaves the model dense: give one to compare with, such as --share.budget=10%"
        )
    with init_world() as world:
        processes = cluster.nodes * per_node(cluster)
        if world.world_size not in (1, processes):
            raise UserError(
                f"the cluster {cluster.name} has {processes} processes, and {world.world_size} were started: "
                f"start one, or {processes}"
            )
        as_there = dataclasses.replace(world, world_size=processes)
        dense = dataclasses.replace(recipe, share=dataclasses.replace(recipe.share, budget=None, plan=None))
        model, timeline = _measured(dense, as_there, steps)
        specs, link = find_specs(model, recipe.share.include, recipe.share.exclude), cluster.link(cluster.nodes)

        def cost(plan: Plan | None, overlap: Overlap, model: nn.Module, timeline: Timeline) -> Exposure:
            own = {
                name: p.numel() for name, p in model.named_parameters() if p.requires_grad and "dist_ssn." not in name
            }
            return predict(messages_of(plan, own, overlap, timeline), overlap, timeline, processes, link)

        found = {"dense": cost(None, Overlap(), model, timeline)}
        model, timeline = _measured(recipe, as_there, steps)
        plan = shared_plan(model)
        assert plan is not None
        for way in WAYS if recipe.engine.overlap in WAYS else (*WAYS, recipe.engine.overlap):
            by_depth = way.startswith("depth")
            there = _at_depth(specs, plan, way) if by_depth else plan
            found[way] = cost(there, parse_overlap("none" if by_depth else way), model, timeline)
        return found if world.rank == 0 else None


def per_node(cluster: Cluster) -> int:
    if isinstance(cluster.processes_per_node, int):
        return cluster.processes_per_node
    return max(1, torch.cuda.device_count())


def _at_depth(specs: Specs, plan: Plan, mapping: str) -> Plan:
    return make_plan(specs, plan.budget, mapping=mapping, seed=plan.seed)


def _measured(recipe: Recipe, world: World, steps: int) -> tuple[nn.Module, Timeline]:
    task, model = build(recipe, world)
    optimizer = build_optimizer(model, recipe.optimizer)
    model.train()

    def loss_of(step: int) -> torch.Tensor:
        batch = task.batch(step, recipe.batch_size, world.rank, world.world_size, recipe.accumulation, 0)
        inputs, targets = (part.to(world.device) for part in batch)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            return task.loss(model(inputs), targets)

    return model, measure_timeline(model, optimizer, loss_of, steps)


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
