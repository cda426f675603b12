"""The best combinations of budget, period and codec for a cluster, as rows, a table and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from dist_ssn.cluster import Cluster
from dist_ssn.cost.ladder import Cost, Rungs
from dist_ssn.sync.losses import BANK, DENSE, SMALL, Task, reference
from dist_ssn.train.recipe.schema import Recipe

MOST_ROWS = 8
_NUMBERS = ("kB", "step\nms", "delayed\nms", "loss", "dense\nkB", "dense\nms", "dense\nloss", "small\nloss")
"""Columns of figures: of the row, then of the dense model with the same rungs, and of one as small as the bank."""


def own_rungs(recipe: Recipe) -> Rungs:
    """The recipe's own combination."""
    sync, name = recipe.sync, "plan" if recipe.share.budget is None else recipe.share.budget
    return Rungs(name, sync.every or 1, sync.codec, sync.delay, sync.within is not None)


def rows_of(costs: Sequence[Cost], model: str) -> list[dict[str, Any]]:
    """The costs as plain data: bytes and milliseconds per step, and the measured loss; the last one is the recipe's own.

    `loss_over_dense` is None where the combination was not measured. With a delay it never is, for all measurements have none.
    """
    task = reference(model)
    return [
        {
            "own": cost is costs[-1],
            "budget": cost.rungs.budget,
            "every": cost.rungs.every,
            "codec": cost.rungs.codec,
            "delay": cost.rungs.delay,
            "islands": cost.rungs.islands,
            "route": cost.route,
            "round_bytes": cost.round_bytes,
            "bytes_per_step_logical": cost.handed_per_step,
            "bytes_per_step_ring": cost.sent_per_step,
            "exposed_ms_per_step": 1000 * cost.exposed,
            "ms_per_step": 1000 * cost.step,
            "loss_over_dense": _loss(task, DENSE if cost.rungs.budget is None else BANK, cost.rungs),
            "loss_over_dense_as_small": None if cost.rungs.budget is None else _loss(task, SMALL, cost.rungs),
        }
        for cost in costs
    ]


def _loss(task: Task, kind: str, rungs: Rungs) -> float | None:
    budget = _fraction(rungs.budget)
    if rungs.delay or (rungs.budget is not None and budget is None):
        return None
    return task.expected(kind, budget, rungs.every, rungs.codec)


def _fraction(budget: float | int | str | None) -> float | None:
    """A budget as a share of the weights; None if it is none, or given in another way."""
    if isinstance(budget, str):
        text = budget.strip()
        return float(text[:-1]) / 100 if text.endswith("%") and text[:-1].replace(".", "", 1).isdigit() else None
    return budget if isinstance(budget, float) else None


def best_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other beats in both step time and loss, and the recipe's own, from the least loss to the shortest step.

    Only rows with a measured loss are compared. Of more than MOST_ROWS, some are left out between the ends.
    """
    measured = [row for row in rows if row["loss_over_dense"] is not None and not row["own"]]
    best = [
        row
        for row in measured
        if not any(
            other["ms_per_step"] <= row["ms_per_step"]
            and other["loss_over_dense"] <= row["loss_over_dense"]
            and (other["ms_per_step"], other["loss_over_dense"]) != (row["ms_per_step"], row["loss_over_dense"])
            for other in measured
        )
    ]
    best.sort(key=lambda row: -row["ms_per_step"])
    if len(best) > MOST_ROWS:  # evenly, with both ends
        best = [best[round(place * (len(best) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]
    return [*best, *(row for row in rows if row["own"])]


def ladder_table(rows: Sequence[dict[str, Any]], every_row: Sequence[dict[str, Any]], cluster: Cluster) -> Table:
    """Rows of `best_of` as a table for the terminal; beside each, the dense model with the same rungs.

    Args:
        rows: to show.
        every_row: all rows, for the twins.
        cluster: named in the title.
    """
    title = f"Rounds on {cluster.name}: sent and step predicted, loss measured elsewhere"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)  # 80 columns
    for name in ("budget", "every", "codec", *_NUMBERS):
        table.add_column(name, justify="right" if name in _NUMBERS or name == "every" else "left", overflow="fold")
    for row in rows:
        late, dense = _twin(every_row, row, delay=1), _twin(every_row, row, budget=None)
        budget = row["budget"]
        name = "dense" if budget is None else f"{budget:.0%}" if isinstance(budget, float) else str(budget)
        name += " ←" if row["own"] else ""
        every = f"{row['every']}" + (", nodes" if row["islands"] else "")
        beside = ("", "", "") if budget is None or dense is None else (_kb(dense), _ms(dense), _times(dense, ""))
        own = (_kb(row), _ms(row), _ms(late) if late else "", _times(row, ""))
        small = "" if budget is None else _times(row, "_as_small")
        table.add_row(name, every, row["codec"], *own, *beside, small)
    return table


def _twin(rows: Sequence[dict[str, Any]], row: dict[str, Any], **changed: Any) -> dict[str, Any] | None:
    keys = ("budget", "every", "codec", "delay", "islands")
    wanted = {**{key: row[key] for key in keys}, **changed}
    return next((other for other in rows if all(other[key] == wanted[key] for key in keys)), None)


def _kb(row: dict[str, Any]) -> str:
    return f"{row['bytes_per_step_ring'] / 1000:,.1f}"


def _ms(row: dict[str, Any]) -> str:
    return f"{row['ms_per_step']:,.1f}"


def _times(row: dict[str, Any], of: str) -> str:
    loss = row[f"loss_over_dense{of}"]
    return "?" if loss is None else f"{loss:.3f}"


def limits(model: str) -> str:
    """Limits of the losses, as a sentence."""
    return (
        "← is this recipe. kB are what a process sends in a step, on average. Losses are over that of the dense model with "
        "gradients on every step, after as many steps, measured in "
        f"{reference(model).described}: one small model, a hint for another. ? was not measured; nor was any delay. "
        "Beside each row: the dense model with the same rungs, and one as small as the bank."
    )
