"""Bytes and time of a step with local updates, or with gradients in a codec: budget × period × codec × delay × islands.

Pure arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from dist_ssn.cost.exchange import coding_seconds, exchange_seconds, gather_seconds, latencies
from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.measured import Measured, Side
from dist_ssn.cost.rates import Rates
from dist_ssn.errors import UserError
from dist_ssn.plan import Plan, make_plan
from dist_ssn.sync import routes
from dist_ssn.sync.codecs import find_codec
from dist_ssn.sync.reports import REPORT_BYTES
from dist_ssn.sync.rounds import FP32_BYTES, Vector, of_every_step, of_hook, of_round, vector_with

BUDGETS = (0.5, 0.25, 0.1, 0.05)
PERIODS = (1, 4, 16, 50)
"""Steps in a round; 1: gradients are averaged on every step."""
CODECS = ("none", "int8", "int4", "bins2", "sparse")
HOOKS = ("none", "int8", "int4")
"""Codecs of gradients that are averaged on every step, by `dist_ssn.comm_hook`; fewer bits have cost too much there."""


@dataclass(frozen=True)
class Rungs:
    """A combination.

    Args:
        budget: share of the weights, or any other budget of a plan; None is dense.
        every: steps in a round; 1 averages gradients on every step (rounds of one step are costed as if they were that).
        codec: of the changes, or of the gradients.
        delay: 0 or 1.
        islands: nodes average gradients on every step, and are the workers.
    """

    budget: float | int | str | None
    every: int
    codec: str = "none"
    delay: int = 0
    islands: bool = False


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a combination.

    Args:
        rungs: the combination.
        route: of the exchange; "" without rounds.
        messages: collectives of a round, or of a step without rounds.
        round_bytes: bytes that a worker hands to the collectives of a round.
        handed_per_step: the same per step, on average.
        sent_per_step: bytes that a worker must send in a step to other workers, on average, by the ring formula.
        exposed: seconds of waiting in a step, on average.
        step: seconds of a step, on average.
    """

    rungs: Rungs
    route: str
    messages: int
    round_bytes: float
    handed_per_step: float
    sent_per_step: float
    exposed: float
    step: float


def cost_of(rungs: Rungs, side: Side, plan: Plan | None, vector: Vector, fabric: Fabric, rates: Rates) -> Cost:
    """Predicted cost of a combination.

    Args:
        rungs: the combination.
        side: measured compute of the model.
        plan: its plan; None if it is dense.
        vector: what it trains.
        fabric: the processes and their links.
        rates: measured.
    """
    if rungs.every == 1:
        codec = rungs.codec
        if codec == "none":
            found, sent = side.step(fabric, plan=plan), of_every_step(vector, fabric.processes)
        else:
            found = side.step_with_hook(codec, fabric, rates, plan)
            buckets = [message.vector for message in side.messages(plan)]
            sent = of_hook(buckets, vector, codec, fabric.processes)
        return Cost(rungs, "", found.rounds, sent.handed, sent.handed, sent.sent, found.exposed, found.step)
    workers, links, compute, inside = fabric.processes, fabric, side.compute, 0.0
    if rungs.islands:
        island = Fabric(1, fabric.per_node, fabric.within, fabric.within, fabric.algorithm)
        workers, links = fabric.nodes, dataclasses.replace(fabric, per_node=1)
        compute = side.step(island, plan=plan).step
        hops = math.ceil(math.log2(fabric.per_node)) if fabric.per_node > 1 else 0
        within = fabric.within
        once = latencies(fabric) * within.latency_seconds + FP32_BYTES * vector.values / within.bytes_per_second
        inside = hops * once  # the mean, from the process that exchanges to the others
    every = rungs.every
    route = routes.traffic(find_codec(rungs.codec), vector.values, vector.plain, workers)
    network = exchange_seconds(vector, rungs.codec, workers, links) + inside
    if rungs.delay:
        network = max(0.0, network - every * compute)
    exposed = (gather_seconds(REPORT_BYTES, workers, links) + network) / every
    busy = (rates.meet * vector.values + coding_seconds(vector, rungs.codec, workers, rates)) / every
    sent = of_round(vector, rungs.codec, workers)
    return Cost(
        rungs,
        route.route,
        messages=1 + len(route.handed),
        round_bytes=sent.handed,
        handed_per_step=sent.handed / every,
        sent_per_step=sent.sent / every,
        exposed=exposed,
        step=compute + exposed + busy,
    )


def combinations(budget: float | int | str | None, fabric: Fabric) -> Iterator[Rungs]:
    """All combinations of one budget on these processes."""
    islands = (False, True) if fabric.nodes > 1 and fabric.per_node > 1 else (False,)
    for every in PERIODS:
        if every == 1:
            yield from (Rungs(budget, 1, codec) for codec in HOOKS)
            continue
        for codec in CODECS:
            yield from (Rungs(budget, every, codec, delay, apart) for delay in (0, 1) for apart in islands)


def ladder_of(measured: Measured, fabric: Fabric, own: Rungs) -> list[Cost]:
    """Costs of all combinations: dense, and with each of BUDGETS that the model has a plan for; and of the recipe's own, the last.

    The compute of a shared model is assumed to be the same for every budget.

    Args:
        measured: both sides of a recipe, with rates.
        fabric: the processes and their links.
        own: a combination of the recipe's own plan; its budget is what the recipe calls it.
    """
    dense, rates = measured.dense.vector, measured.rates
    assert rates is not None
    costs = [cost_of(rungs, measured.dense, None, dense, fabric, rates) for rungs in combinations(None, fabric)]
    base = measured.shared.plan
    assert base is not None
    for budget in BUDGETS:
        try:
            plan = make_plan(measured.specs, budget, seed=base.seed)
        except UserError:  # the model has no plan of that size
            continue
        vector = vector_with(plan, dense, measured.specs)
        costs += [
            cost_of(rungs, measured.shared, plan, vector, fabric, rates) for rungs in combinations(budget, fabric)
        ]
    return [*costs, cost_of(own, measured.shared, base, measured.shared.vector, fabric, rates)]
