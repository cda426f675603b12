"""Losses that were measured on the ladder's rungs, as a table in a file: what a planner expects of a combination.

The file is written by `python -m benchmarks.documents.ladder_losses`, from the lines of `benchmarks/results/ladder/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("ladder_losses.json")
FORMAT = 1
CODECS = ("none", "bf16", "int8", "int4", "bins2", "sparse")
"""From many bits to few ("fp16" is like "bf16")."""
BANK, DENSE, SMALL = "bank", "dense", "small"
"""Kinds of model: shared, dense, and dense with as many parameters as the budget."""


@dataclass(frozen=True)
class Task:
    """Losses of one task.

    Args:
        name: key in the file.
        described: the model and its run, as text.
        ratios: (kind, budget, every, codec) → loss over that of the dense model with gradients on every step.
    """

    name: str
    described: str
    ratios: Mapping[tuple[str, float | None, int, str], float]

    def expected(self, kind: str, budget: float | None, every: int, codec: str) -> float | None:
        """Loss over that of dense, synchronized on every step; None if the combination was not measured.

        Args:
            kind: BANK, DENSE or SMALL.
            budget: share of the weights; None if dense.
            every: steps in a round; 1: gradients are averaged on every step.
            codec: name of the codec.
        """
        for (its_kind, known, *rest), ratio in self.ratios.items():
            if [its_kind, *rest] == [kind, every, codec] and _is_near(known, budget):
                return ratio
        return None

    def at_most(self, kind: str, budget: float | None, every: int, codec: str) -> float | None:
        """The least loss that was measured with no more of anything; None if there is none.

        That is with the same kind of model, at most this budget, rounds at least as long, and at most as many bits. The loss is at
        most that, if more bytes are no worse than fewer.

        Args:
            kind: as in `expected`, and so are the others.
            budget: share of the weights.
            every: steps in a round.
            codec: name of the codec.
        """
        fewer = CODECS[CODECS.index(codec) :]
        found = [
            ratio
            for (its_kind, known, its_every, its_codec), ratio in self.ratios.items()
            if its_kind == kind and its_every >= every and its_codec in fewer and _is_at_most(known, budget)
        ]
        return min(found, default=None)


def _is_at_most(known: float | None, budget: float | None) -> bool:
    return _is_near(known, budget) or (known is not None and budget is not None and known < budget)


def _is_near(known: float | None, budget: float | None) -> bool:
    """A plan may be a little smaller than its budget."""
    if known is None or budget is None:
        return known is budget
    return abs(budget / known - 1) <= 0.03


@cache
def measured_losses() -> Mapping[str, Task]:
    """Task → its losses."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    assert content["format"] == FORMAT, FILE
    return {
        name: Task(
            name,
            task["described"],
            {(row["kind"], row["budget"], row["every"], row["codec"]): row["over_dense"] for row in task["rows"]},
        )
        for name, task in content["tasks"].items()
    }


def reference(model: str) -> Task:
    """The measured task that is nearest to a recipe's model: of the same name, or the GPT."""
    tasks = measured_losses()
    return tasks.get(model, tasks["gpt"])
