"""Advice on sharing for a network: where it breaks even, which budget the network hides, and which budget to start with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.measured import Measured
from dist_ssn.errors import UserError
from dist_ssn.plan import make_plan

LEAST_MBIT, MOST_MBIT = 1e-2, 1e8
HIDDEN_TOLERANCE = 0.05
"""Communication counts as hidden if it makes a step longer by at most this fraction of its compute."""
WORTHWHILE_SPEEDUP = 1.05
"""Sharing pays if a dense step takes at least this multiple of a shared step's time."""
PROVEN_BUDGETS = ((3_000_000, 0.05), (0, 0.1))
"""(least number of trainable parameters, smallest budget with which a bank reached its dense twin's loss in no more steps)
(docs/results/quality.md; GPTs of 3.2 and 0.8 million)."""
_STEPS = 40  # of a bisection


@dataclass(frozen=True)
class Advice:
    """Expected gain from sharing.

    Args:
        crossover_mbit: bandwidth in Mbit/s below which a shared step is faster than a dense one; 0: at no bandwidth;
            infinite: at every bandwidth.
        hidden_budget: the largest fraction of the weights whose bank's communication is hidden (HIDDEN_TOLERANCE); None: none.
        budget: the one to start with: `hidden_budget`, but not below PROVEN_BUDGETS; None: the model has no plan of that size.
        faster: a dense step's time over a shared step's, on this cluster.
        pays: True if `faster` is at least WORTHWHILE_SPEEDUP.
        why: the reason, as a sentence.
    """

    crossover_mbit: float
    hidden_budget: float | None
    budget: float | None
    faster: float
    pays: bool
    why: str


def advise(measured: Measured, fabric: Fabric) -> Advice:
    """Advice for a recipe on these processes, with one message per bank."""
    dense, shared = measured.dense.step(fabric), measured.shared.step(fabric)
    faster = dense.step / shared.step
    crossover = crossover_mbit(measured, fabric)
    if faster >= WORTHWHILE_SPEEDUP:
        why = f"share: a step takes {shared.step / dense.step:.2f} of a dense one's time"
    elif dense.exposed <= HIDDEN_TOLERANCE * measured.dense.compute:
        why = f"don't share for the network's sake: it takes {dense.exposed / dense.step:.1%} of a dense step"
    else:
        slower = measured.shared.compute - measured.dense.compute
        why = (
            f"don't share for the network's sake: sharing saves {1000 * (dense.exposed - shared.exposed):.1f} ms of "
            f"communication in a step, and its compute takes {1000 * slower:.1f} ms more"
        )
    hidden = hidden_budget(measured, fabric)
    proven = next(budget for parameters, budget in PROVEN_BUDGETS if measured.dense.parameters >= parameters)
    budget = max(hidden or 0.0, proven)
    first = budget if _exposed(measured, fabric, budget) is not None else None
    return Advice(crossover, hidden, first, faster, faster >= WORTHWHILE_SPEEDUP, why)


def crossover_mbit(measured: Measured, fabric: Fabric) -> float:
    """Largest bandwidth, in Mbit/s, at which a shared step is faster than a dense one; 0: at none, infinite: at every one."""

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
    """Largest budget, at most 1, at which communication is hidden (HIDDEN_TOLERANCE); None if there is none."""
    allowed = HIDDEN_TOLERANCE * measured.shared.compute
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
    """Seconds that a step waits with a plan of this budget; None if no plan of the model is that small."""
    plan = measured.shared.plan
    assert plan is not None
    try:
        there = make_plan(measured.specs, budget, seed=plan.seed)
    except UserError:
        return None
    return measured.shared.step(fabric, plan=there).exposed


def bandwidth(mbit: float) -> str:
    """A bandwidth as text, such as "3.1 Gbit/s"."""
    for unit, size in (("Tbit/s", 1e6), ("Gbit/s", 1e3), ("Mbit/s", 1.0)):
        if mbit >= size:
            return f"{mbit / size:.3g} {unit}"
    return f"{1000 * mbit:.3g} kbit/s"


def sentences(advice: Advice, fabric: Fabric) -> list[str]:
    """The advice in sentences."""
    if advice.crossover_mbit == 0:
        first = (
            "A shared step is faster than a dense one at no bandwidth: its extra compute takes longer than it saves."
        )
    elif math.isinf(advice.crossover_mbit):
        first = "A shared step is faster than a dense one at every bandwidth."
    else:
        first = f"Below {bandwidth(advice.crossover_mbit)} a shared step is faster than a dense one."
    here = bandwidth(fabric.link.bandwidth_mbit)
    second = (
        f"At {here} every bank makes a step more than {HIDDEN_TOLERANCE:.0%} longer than its compute."
        if advice.hidden_budget is None
        else f"At {here} a bank of up to {advice.hidden_budget:.1%} makes a step at most {HIDDEN_TOLERANCE:.0%} longer "
        "than its compute."
    )
    lines = [first, second, f"Here: {advice.why}."]
    if advice.pays and advice.budget is not None:
        hides = advice.hidden_budget is not None and advice.hidden_budget >= advice.budget
        why = (
            "the most that the network hides"
            if hides
            else "smaller banks needed more steps than dense (docs/results/quality.md)"
        )
        lines.append(f"A budget to begin with: {advice.budget:.1%}; {why}.")
    return lines
