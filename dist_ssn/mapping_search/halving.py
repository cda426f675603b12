"""Successive halving as arithmetic: which candidates, how many steps each in each rung, within a budget of steps.

Source: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization", arXiv 1502.07943.
Letters: n candidates, h steps of each in the first rung; every rung keeps the better half for twice the steps.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.errors import UserError

LEAST_STEPS = 8
"""Of a trial: after fewer, losses say nothing."""


@dataclass(frozen=True)
class Candidate:
    """A mapping (of `plan.MAPPINGS`, or "method" or "method:groups" of `METHODS`) and a morph."""

    mapping: str
    morph: str

    @property
    def method(self) -> str:
        return self.mapping.partition(":")[0]

    @property
    def groups(self) -> int | None:
        number = self.mapping.partition(":")[2]
        return int(number) if number else None


MAPPINGS = (
    *("auto", "weights-free", "gradients", "depth:2", "random:4", "pretrain", "weights-free:4", "shape"),
    *("gradients:4", "pretrain:4", "depth:4", "random:2"),
)
MORPHS = ("auto", "hash")
"""What a search tries where the recipe names no morph; the order is that in which a smaller budget leaves candidates out."""


def candidates(morph: str) -> list[Candidate]:
    """All candidates, today's defaults first, so that a search is never without them."""
    morphs = MORPHS if morph == "auto" else (morph,)
    ranked = [
        (i + 3 * j, i, Candidate(mapping, name)) for i, mapping in enumerate(MAPPINGS) for j, name in enumerate(morphs)
    ]
    return [candidate for *_, candidate in sorted(ranked, key=lambda item: item[:2])]


def rungs_of(count: int, first: int, most: int) -> list[tuple[int, int]]:
    """(candidates, steps of each) in each rung; no trial is longer than `most` steps."""
    rungs = [(count, min(first, most))]
    while rungs[-1][0] > 2:
        kept, steps = rungs[-1]
        rungs.append((-(-kept // 2), min(2 * steps, most)))
    return rungs


def steps_of(rungs: Sequence[tuple[int, int]], overhead: int = 0) -> int:
    """All steps of the rungs together, where each trial costs `overhead` steps besides its own."""
    return sum(count * (steps + overhead) for count, steps in rungs)


def schedule(
    wanted: Sequence[Candidate], budget: int, most: int, costs: dict[str, int], overhead: int = 0
) -> tuple[int, int]:
    """(how many of the first candidates to try, steps of each in the first rung): as many as the budget has room for.

    Args:
        budget: steps in all; most: of one trial; costs: steps that a method itself takes, once for each number of groups.
        overhead: of each trial and method, in steps: what is not training, where the budget is one of time.

    Raises:
        UserError: the budget is too small for one trial.
    """
    least = min(LEAST_STEPS, most)
    for count in range(len(wanted), 0, -1):
        mappings = {c.mapping: costs[c.method] + overhead for c in wanted[:count] if c.method in costs}
        left = budget - sum(mappings.values())
        possible = range(least, most + 1)
        fitting = bisect.bisect_right(
            possible, left, key=lambda first, count=count: steps_of(rungs_of(count, first, most), overhead)
        )
        if fitting:
            return count, possible[fitting - 1]
    raise UserError(
        f"search: a budget of {budget} steps is too small for one trial, which takes at least {least + overhead}: give more by "
        "max_steps or max_seconds"
    )
