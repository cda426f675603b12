"""Suites of `benchmarks.ladder`: each yields its cells in the order of their worth, as far as the lines so far decide them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.ladder.cells import AVERAGE, SMALL, Cell, cell, identity

Line = Mapping[str, Any]
Model = tuple[str, float | None]
"""Kind and budget."""
Suite = Callable[[Iterable[Line]], Iterator[Cell]]
"""The lines so far → cells."""
DENSE: Model = ("dense", None)
FAMILIES: tuple[Model, ...] = (DENSE, ("bank", 0.25), ("small", 0.25))
"""Models that are tuned under local updates; the others of a kind take its settings."""
NESTEROV = (0.7, 0.6)
DILOCO = (0.7, 0.9)
OUTER = (NESTEROV, AVERAGE, DILOCO)
"""Outer learning rates and momenta that are tried. Plain averaging is that of post-local SGD and of SparseLoCo."""
CLOSE = 1.02
"""Plain averaging gets learning rates of its own, if at the best rate of NESTEROV its loss is below this multiple; dense always,
because post-local SGD is that."""
FIRST: dict[tuple[str, str], float] = {
    **{("gpt", "dense"): 3e-3, ("gpt", "bank"): 3e-3, ("gpt", "small"): 6e-3, ("gpt", "hashed"): 6e-3},
    **{("lstm", "dense"): 1.2e-2, ("lstm", "bank"): 6e-3, ("lstm", "small"): 2.4e-2, ("lstm", "hashed"): 2.4e-2},
    **{("wrn", "dense"): 0.2, ("wrn", "bank"): 0.1, ("wrn", "small"): 0.2, ("wrn", "hashed"): 0.2},
}
"""(task, kind) → learning rate in the middle of the first three that are tried, factor 2 apart."""
FRONTIERS = ("gpt", "lstm", "wrn")
"""Tasks whose rungs are all measured and tuned."""
AGREEMENT_RATES = {**FIRST, ("lstm", "dense"): 2.4e-2}
LONG, SHORT = 50, 16
"""Periods, in steps."""


def agreement(lines: Iterable[Line]) -> Iterator[Cell]:
    """Dense, banks, and dense as small as a bank, over a run of each task, at two periods."""
    for task in ("lstm", "wrn", "gpt"):
        models = (*FAMILIES[:2], ("bank", 0.1), *([] if task == "wrn" else [("small", 0.25)]))
        for every in (SHORT, LONG):
            for kind, budget in models:
                yield cell(task, kind, budget, AGREEMENT_RATES[task, kind], every, outer=NESTEROV)


class Measured:
    """Losses of the cells that have a line."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._losses = {identity(line): line["validation_loss"] for line in lines}

    def loss(self, one: Cell) -> float | None:
        return self._losses.get(identity(one))

    def ratio(self, one: Cell, other: Cell) -> float:
        """Loss of one cell over that of another; infinite until both are measured."""
        losses = self.loss(one), self.loss(other)
        return losses[0] / losses[1] if losses[0] is not None and losses[1] else float("inf")

    def best(self, cells: Sequence[Cell]) -> Cell:
        """The cell with the least loss; the first one, if none is measured."""
        known = [one for one in cells if self.loss(one) is not None]
        return min(known or cells[:1], key=lambda one: self.loss(one) or 0.0)

    def by_rate(self, make: Callable[[float], Cell], middle: float, cells: list[Cell]) -> Iterator[Cell]:
        """Cells at `middle`, half and twice of it, and further while the best is the last of the grid; `cells` gets all of them."""
        low, high = middle / 2, middle * 2
        cells += [make(middle), make(low), make(high)]
        yield from cells
        while all(self.loss(one) is not None for one in cells):
            best = self.best(cells)["lr"]
            if low < best < high:
                return
            low, high = (low / 2, high) if best == low else (low, high * 2)
            cells.append(make(low if best < middle else high))
            yield cells[-1]


def frontier(task: str, lines: Iterable[Line]) -> Iterator[Cell]:
    """Loss at equal steps against bytes.

    Learning rates first, synchronous and with a period of 16; then the outer optimizer; then codecs, the long period, other
    budgets, further periods; then further seeds of everything on the frontier.
    """
    known = Measured(lines)
    synchronous: dict[Model, list[Cell]] = {model: [] for model in FAMILIES}
    for model in FAMILIES:
        yield from known.by_rate(lambda lr, of=model: cell(task, *of, lr), FIRST[task, model[0]], synchronous[model])
    local: dict[Model, Cell] = {}
    for model in FAMILIES:
        tried: list[Cell] = []
        middle = known.best(synchronous[model])["lr"]
        yield from known.by_rate(lambda lr, of=model: cell(task, *of, lr, SHORT, outer=NESTEROV), middle, tried)
        chosen = known.best(tried)
        others = [{**chosen, "outer": list(outer)} for outer in OUTER]
        yield from others
        if model == DENSE or known.ratio(others[1], chosen) < CLOSE:
            yield from known.by_rate(
                lambda lr, of=model: cell(task, *of, lr, SHORT, outer=AVERAGE), chosen["lr"], others
            )
        local[model] = known.best(others)
    yield from _rungs(task, known, {model: known.best(synchronous[model]) for model in FAMILIES}, local)


def _rungs(
    task: str, known: Measured, synchronous: Mapping[Model, Cell], local: Mapping[Model, Cell]
) -> Iterator[Cell]:
    """The rungs at the settings of each family, further seeds of the frontier, and what is left."""
    frontier = [*synchronous.values()]
    sparse, long = {}, {}
    for base in local.values():
        yield {**base, "codec": "int4"}
        frontier.append({**base, "codec": "int4"})
    for model, base in local.items():
        outers = dict.fromkeys((AVERAGE, (base["outer"][0], base["outer"][1])))
        tried = [{**base, "codec": "sparse", "outer": list(outer)} for outer in outers]
        yield from tried
        sparse[model] = known.best(tried)
        frontier.append(sparse[model])
    for model, base in local.items():
        tried = [{**base, "every": LONG, "lr": factor * base["lr"]} for factor in (1, 0.5)]
        yield from tried
        long[model] = known.best(tried)
        yield {**long[model], "codec": "int4"}
        frontier.append({**long[model], "codec": "int4"})
        if model == DENSE:
            base = {**long[model], "outer": list(DILOCO)}
            yield from known.by_rate(lambda lr, base=base: {**base, "lr": lr}, base["lr"], [])
    for base in synchronous.values():
        yield {**base, "codec": "int4"}
        frontier.append({**base, "codec": "int4"})
    for base in local.values():
        outers = dict.fromkeys((AVERAGE, (base["outer"][0], base["outer"][1])))
        tried = [{**base, "every": 4, "codec": "int4", "outer": list(outer)} for outer in outers]
        yield from tried
        frontier.append(known.best(tried))
    yield from _budgets(task, known, {model[0]: {**base, "codec": "int4"} for model, base in local.items()})
    for seed in (1, 2):
        yield from ({**one, "seed": seed} for one in frontier)
    for model, base in local.items():
        yield {**sparse[model], "every": LONG, "lr": long[model]["lr"]}
        yield {**base, "codec": "bins2"}
        yield {**base, "codec": "int8"}
    yield from _budgets(task, known, {model[0]: base for model, base in synchronous.items()})


def _budgets(task: str, known: Measured, settings: Mapping[str, Cell]) -> Iterator[Cell]:
    """Cells of other budgets, at the settings of their kind; hashed weights at those of a bank, but at their own learning rate."""
    for kind, budget in (("bank", 0.1), ("small", 0.1), ("bank", 0.5), ("bank", 0.05)):
        if kind != "small" or (task, budget) in SMALL:
            yield {**settings[kind], "kind": kind, "budget": budget}
    base = {**settings["bank"], "kind": "hashed", "budget": 0.25}
    yield from known.by_rate(lambda lr: {**base, "lr": lr}, FIRST[task, "hashed"], [])


def seeds(task: str, lines: Iterable[Line]) -> Iterator[Cell]:
    """Further seeds of the families, synchronous and every 16 steps in 4 bits, at the best settings of seed 0 so far.

    Of the LSTM, whose losses at high learning rates differ more between seeds, at the two best settings.
    """
    measured = [line for line in lines if line["task"] == task and not line["seed"]]
    for seed in (1, 2):
        for model in FAMILIES:
            for rung in ((1, "none"), (SHORT, "int4")):
                tried = [
                    one
                    for one in measured
                    if (one["kind"], one["budget"], one["every"], one["codec"]) == (*model, *rung)
                ]
                for best in sorted(tried, key=lambda one: one["validation_loss"])[: 2 if task == "lstm" else 1]:
                    yield cell(task, *model, best["lr"], *rung, (best["outer"][0], best["outer"][1]), seed)


def long(lines: Iterable[Line]) -> Iterator[Cell]:
    """A larger GPT for 2,000 steps: few rungs, at the learning rates that were best on every step, then some at twice as high."""
    task, rungs = "gpt-128", ((SHORT, "int4", NESTEROV), (LONG, "int4", NESTEROV), (4, "int4", AVERAGE))
    banks = (("bank", 0.25), ("bank", 0.5))
    yield cell(task, *DENSE, 3e-3)
    for model, lr in ((banks[0], 3e-3), (DENSE, 3e-3), (banks[1], 3e-3), (("small", 0.25), 6e-3)):
        yield cell(task, *model, lr, *rungs[0])
    for rung in rungs[1:]:
        yield cell(task, *banks[0], 3e-3, *rung)
    yield cell(task, *banks[0], 3e-3)
    yield cell(task, "small", 0.25, 6e-3)
    for model in (banks[0], DENSE):
        yield cell(task, *model, 6e-3, *rungs[0])
    yield cell(task, *DENSE, 6e-3)


SUITES: dict[str, Suite] = {
    "agreement": agreement,
    "long": long,
    **{f"frontier-{task}": partial(frontier, task) for task in FRONTIERS},
    **{f"seeds-{task}": partial(seeds, task) for task in FRONTIERS},
}
