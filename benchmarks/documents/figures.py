"""Figures of the docs. The same lines give the same bytes: a figure holds no date, no version and no font of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.documents import sizes
from benchmarks.documents.ladder import model_name
from benchmarks.documents.quality import losses_by_budget
from benchmarks.ladder.rungs import DENSE, loss_of, rungs
from benchmarks.ladder.suites import FRONTIERS
from benchmarks.network import ladder_target
from benchmarks.result_files import latest, lines_of
from dist_ssn.report import plot_loss_against_bytes


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})


def budgets(path: Path) -> None:
    """Loss at the best learning rate against the budget, beside dense: the mean as a line, each seed as a point."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for optimizer, marker in (("adamw", "o"), ("sgd", "s")):
        cells = losses_by_budget(optimizer).items()
        best = {budget: min(rates.values(), key=statistics.mean) for budget, rates in cells}
        shared = sorted((budget, losses) for budget, losses in best.items() if budget is not None)
        means = [statistics.mean(losses) for _, losses in shared]
        (line,) = axes.plot([100 * budget for budget, _ in shared], means, marker=marker, label=f"{optimizer}, bank")
        for budget, losses in shared:
            axes.plot([100 * budget] * len(losses), losses, ".", color=line.get_color(), alpha=0.5)
        axes.axhline(statistics.mean(best[None]), color=line.get_color(), linestyle="--", label=f"{optimizer}, dense")
    axes.set_xscale("log")
    axes.set_xticks([2, 10, 50, 100], labels=["2", "10", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("budget, % of the weights")
    axes.set_ylabel("validation loss, nats per byte")
    axes.legend()
    save(figure, path)


def curves(path: Path) -> None:
    """A plot per task: loss against budget, mean and each seed, beside dense and the former default mapping."""
    tasks = [task for task in sizes.MODELS if max(len(sizes.on_curves(task, name)) for name in (None, "scale")) > 2]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(grid, tasks, strict=False):
        shared = sizes.on_curves(task)
        for budget, runs in shared.items():
            axes.plot([budget] * len(runs), [run["validation_loss"] for run in runs], ".", color="C0", alpha=0.4)
        axes.plot(list(shared), [sizes.mean_of(runs) for runs in shared.values()], marker="o", label="bank")
        if len(before := sizes.on_curves(task, "scale")) > 2:
            means = [sizes.mean_of(runs) for runs in before.values()]
            axes.plot(list(before), means, color="C0", linestyle=":", label="before: one per scale")
        dense = sizes.methods(task, 0.1)["dense"][1]
        axes.axhline(sizes.mean_of(dense), color="C1", linestyle="--", label="dense")
        axes.set_xscale("log")
        ticks = (0.005, 0.02, 0.1, 0.5, 2, 8)
        axes.set_xticks(ticks, labels=[f"{100 * tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(sizes.MODELS[task], fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    figure.supxlabel("budget, % of the weights", fontsize=9)
    figure.supylabel("validation loss", fontsize=9)
    save(figure, path)


def quickstart(path: Path) -> None:
    """Loss against bytes for the newest run of each model of `make train`."""
    plot_loss_against_bytes(list(latest(lines_of("quickstart"), ("name",)).values()), path)


def ladder(task: str, path: Path) -> None:
    """Loss against bytes of every rung: a line per model joins its best rungs, a marker's shape is the period."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    markers = {1: "o", 4: "^", 16: "s", 50: "D"}
    models: dict[str, list[tuple[float, float, int]]] = {}
    for (kind, budget, every, _), runs in rungs(task).items():
        point = (runs[0]["bytes"], loss_of(runs), every)
        models.setdefault(model_name(kind, budget).strip("*"), []).append(point)
    for index, (name, points) in enumerate(models.items()):
        best, least = [], float("inf")
        for size, loss, _ in sorted(points):
            if loss < least:
                best.append((size, loss))
                least = loss
        axes.plot(*zip(*best, strict=True), color=f"C{index}", linewidth=1, alpha=0.7)
        for every, marker in markers.items():
            there = [(size, loss) for size, loss, period in points if period == every]
            if there:
                axes.plot(*zip(*there, strict=True), marker, color=f"C{index}", markersize=5)
        axes.plot([], [], "-", color=f"C{index}", label=name)
    for every, marker in markers.items():
        axes.plot([], [], marker, color="grey", label=f"every {every} steps" if every > 1 else "every step")
    axes.axhline(loss_of(rungs(task)[DENSE]), color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("bytes that one worker hands over in the whole run (logarithmic)")
    axes.set_ylabel(f"validation loss, nats{'' if task == 'wrn' else ' per byte'}")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    save(figure, path)


def times(path: Path) -> None:
    """Seconds to dense's final loss of the LSTM, by link, of every side that reaches it."""
    lines = lines_of("ladder_target")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    links = ladder_target.LINKS
    reached = (name for name in ladder_target.SIDES if ladder_target.seconds_to_target(name, links[-1], lines))
    names = list(reached)[::-1]
    for index, link in enumerate(links):
        found = [ladder_target.seconds_to_target(name, link, lines) for name in names]
        places = [row + 0.27 * (1 - index) for row, seconds in enumerate(found) if seconds]
        axes.barh(
            places, [seconds for seconds in found if seconds], 0.25, color=f"C{index}", label=ladder_target.named(*link)
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds to dense's final loss, steps alone (logarithmic)")
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


FIGURES: dict[str, Callable[[Path], None]] = {
    "quality_by_budget.png": budgets,
    "quality_curves.png": curves,
    "loss_against_bytes.png": quickstart,
    "ladder_target.png": times,
    **{f"ladder_{task}.png": partial(ladder, task) for task in FRONTIERS},
}
"""File in docs/ → the function that draws it."""
