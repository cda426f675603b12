"""Figures of the docs. The same lines make the same bytes: no date, no version, no font of the machine's own is in them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from dist_ssn.report import plot_loss_against_bytes

from ..results import latest, lines_of
from .quality import losses_by_budget


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})


def budgets(path: Path) -> None:
    """Loss at the best rate against the budget, beside dense: mean, and each seed as a point."""
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


def quickstart(path: Path) -> None:
    """The newest run of each side of `make train`."""
    plot_loss_against_bytes(list(latest(lines_of("quickstart"), ("name",)).values()), path)


FIGURES: dict[str, Callable[[Path], None]] = {
    "quality_by_budget.png": budgets,
    "loss_against_bytes.png": quickstart,
}
"""File in docs/ → how to draw it."""
