"""Whether sharing pays on a network: where it breaks even, what budget the network bears and which to begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.measured import Measured
from dist_ssn.errors import UserError
from dist_ssn.plan import make_plan

LEAST_MBIT, MOST_MBIT = 1e-2, 1e8
LONGER = 0.05  # by which share of compute a step may be longer for the network's sake
WORTH = 1.05  # how much faster a step must be to be worth a change
PROVEN = ((3_000_000, 0.05), (0, 0.1))
"""From so many trainable numbers on: the least budget with which a bank came to its dense twin's loss in no more steps
(docs/results/quality.md; GPTs of 3.2 and 0.8 million)."""
_STEPS = 40  # of a bisection


@dataclass(frozen=True)
class Advice:
    """What to expect.

    Args:
        crossover_mbit: below it a shared step is faster than a dense one; 0: at no bandwidth; infinite: at every one
        hidden_budget: the largest share of the weights whose bank makes a step at most LONGER than its compute; None: none does
        budget: to begin with: hidden_budget, but not below what PROVEN says; None: the model has no plan of that size
        faster: a dense step's time over a shared one's, here
        pays: whether that is worth it
        why: in a sentence
    """

    crossover_mbit: float
    hidden_budget: float | None
    budget: float | None
    faster: float
    pays: bool
    why: str


def advise(measured: Measured, fabric: Fabric) -> Advice:
    """For a recipe on these processes, with one message per bank."""
    dense, shared = measured.dense.step(fabric), measured.shared.step(fabric)
    faster = dense.step / shared.step
    crossover = crossover_mbit(measured, fabric)
    if faster >= WORTH:
        why = f"share: a step takes {shared.step / dense.step:.2f} of a dense one's time"
    elif dense.exposed <= LONGER * measured.dense.compute:
        why = f"don't share for the network's sake: it takes {dense.exposed / dense.step:.1%} of a dense step"
    else:
        slower = measured.shared.compute - measured.dense.compute
        why = (
            f"don't share for the network's sake: that saves {1000 * (dense.exposed - shared.exposed):.1f} ms of a step, "
            f"and its compute takes {1000 * slower:.1f} ms more"
        )
    hidden = hidden_budget(measured, fabric)
    proven = next(budget for numbers, budget in PROVEN if measured.dense.numbers >= numbers)
    budget = max(hidden or 0.0, proven)
    first = budget if _exposed(measured, fabric, budget) is not None else None
    return Advice(crossover, hidden, first, faster, faster >= WORTH, why)


def crossover_mbit(measured: Measured, fabric: Fabric) -> float:
    """The largest bandwidth at which a shared step is faster than a dense one; 0 if there is none, infinite if there is no end."""

    def wins(mbit: float) -> bool:
        there = fabric.at(mbit)
        return measured.shared.step(there).step < measured.dense.step(there).step

    if wins(MOST_MBIT):
        return math.inf
    grid = [10**power for power in range(int(math.log10(MOST_MBIT)), int(math.log10(LEAST_MBIT)) - 1, -1)]
    low = next((mbit for mbit in grid if wins(mbit)), None)
    if low is None:
        return 0.0
    high = 10.0 * low
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def hidden_budget(measured: Measured, fabric: Fabric) -> float | None:
    """The largest budget, at most all of the weights, at which the network makes a step at most LONGER than its compute."""
    allowed = LONGER * measured.shared.compute
    whole = _exposed(measured, fabric, 1.0)
    if whole is not None and whole <= allowed:
        return 1.0
    best, low, high = None, 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        waits = _exposed(measured, fabric, middle)
        if waits is not None and waits > allowed:
            high = middle
        else:
            low, best = middle, best if waits is None else middle
    return best


def _exposed(measured: Measured, fabric: Fabric, budget: float) -> float | None:
    """Seconds a step waits with a plan of this budget; None: it is less than what the weights keep of their own."""
    plan = measured.shared.plan
    assert plan is not None
    try:
        there = make_plan(measured.specs, budget, seed=plan.seed)
    except UserError:
        return None
    return measured.shared.step(fabric, plan=there).exposed


def bandwidth(mbit: float) -> str:
    """3.1 Gbit/s."""
    for unit, size in (("Tbit/s", 1e6), ("Gbit/s", 1e3), ("Mbit/s", 1.0)):
        if mbit >= size:
            return f"{mbit / size:.3g} {unit}"
    return f"{1000 * mbit:.3g} kbit/s"


def sentences(advice: Advice, fabric: Fabric) -> list[str]:
    """What to expect, for a person."""
    if advice.crossover_mbit == 0:
        first = "At no bandwidth is a shared step faster than a dense one: its compute takes longer than what it saves."
    elif math.isinf(advice.crossover_mbit):
        first = "A shared step is faster than a dense one at every bandwidth."
    else:
        first = f"Below {bandwidth(advice.crossover_mbit)} a shared step is faster than a dense one."
    here = bandwidth(fabric.link.bandwidth_mbit)
    second = (
        f"At {here} any bank makes a step more than {LONGER:.0%} longer than its compute."
        if advice.hidden_budget is None
        else f"At {here} a bank of up to {advice.hidden_budget:.1%} makes a step at most {LONGER:.0%} longer than its compute."
    )
    told = [first, second, f"Here: {advice.why}."]
    if advice.pays and advice.budget is not None:
        hides = advice.hidden_budget is not None and advice.hidden_budget >= advice.budget
        why = (
            "the most that the network hides"
            if hides
            else "smaller banks needed more steps than dense (docs/results/quality.md)"
        )
        told.append(f"A budget to begin with: {advice.budget:.1%}; {why}.")
    return told
