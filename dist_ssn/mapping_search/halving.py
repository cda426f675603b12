"""Successive halving as arithmetic: the candidates, and their steps in each rung, within a budget of steps.

Source: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization", arXiv 1502.07943.
Letters: n candidates, h steps of each in the first rung; every rung keeps the better half for twice the steps.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.errors import UserError

LEAST_STEPS = 8
"""Least number of steps of a trial: after fewer, losses say nothing."""


@dataclass(frozen=True)
class Candidate:
    """A mapping (of `plan.MAPPINGS`, or "method" or "method:groups" of `METHODS`) and a morph."""

    mapping: str
    morph: str

    @property
    def method(self) -> str:
        """The mapping without its number of groups."""
        return self.mapping.partition(":")[0]

    @property
    def groups(self) -> int | None:
        """Number of groups, where the mapping gives it."""
        number = self.mapping.partition(":")[2]
        return int(number) if number else None


MAPPINGS = (
    *("auto", "weights-free", "gradients", "depth:2", "random:4", "pretrain", "weights-free:4", "shape"),
    *("gradients:4", "pretrain:4", "depth:4", "random:2"),
)
MORPHS = ("auto", "hash")
"""Morphs that a search tries if the recipe names none. A smaller budget leaves out the last candidates first."""


def candidates(morph: str) -> list[Candidate]:
    """All candidates, with the defaults of `share` first, so that every search includes them."""
    morphs = MORPHS if morph == "auto" else (morph,)
    ranked = [
        (i + 3 * j, i, Candidate(mapping, name)) for i, mapping in enumerate(MAPPINGS) for j, name in enumerate(morphs)
    ]
    return [candidate for *_, candidate in sorted(ranked, key=lambda item: item[:2])]


def rungs_of(count: int, first: int, most: int) -> list[tuple[int, int]]:
    """The rungs, as (number of candidates, steps of each); no trial is longer than `most` steps."""
    rungs = [(count, min(first, most))]
    while rungs[-1][0] > 2:
        kept, steps = rungs[-1]
        rungs.append((-(-kept // 2), min(2 * steps, most)))
    return rungs


def steps_of(rungs: Sequence[tuple[int, int]], overhead: int = 0) -> int:
    """Sum of the rungs' steps, where each trial costs `overhead` steps besides its own."""
    return sum(count * (steps + overhead) for count, steps in rungs)


def schedule(
    wanted: Sequence[Candidate], budget: int, most: int, costs: dict[str, int], overhead: int = 0
) -> tuple[int, int]:
    """The largest number of candidates that a budget allows.

    Args:
        wanted: all candidates, the most important first.
        budget: steps in all.
        most: steps of the longest trial.
        costs: method → steps that it takes itself, once for each number of groups.
        overhead: cost of each trial and method besides its training steps, in steps, where the budget is one of time.

    Returns:
        (number of candidates to try, steps of each in the first rung).

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
