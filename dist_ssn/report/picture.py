"""A picture of a plan: the mapping (weights × banks) and the budget's split between banks, as PNG and for the terminal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from rich.markup import escape
from rich.table import Table

from dist_ssn.errors import UserError
from dist_ssn.plan import Plan

# Okabe and Ito's palette (see plot.py). It repeats for further banks, which their columns distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_WIDEST = 12  # characters of the longest bar in the terminal, where there are few banks
_ROOM = 36  # characters for the longest bars of all banks together
_MOST_COLUMNS = 12


def _colour(bank: int) -> str:
    return _COLOURS[bank % len(_COLOURS)]


def plan_picture(plan: Plan) -> Table:
    """Table of weights (rows) and banks (columns): a bar in the bank that a weight reads, as long as the weight's elements."""
    largest = max(slot.numel for _, slot in plan.slots())
    few = plan.groups[:_MOST_COLUMNS]
    widest = max(3, min(_WIDEST, _ROOM // len(few)))
    table = Table(padding=(0, 1, 0, 0), box=None)
    table.add_column("weight", overflow="fold")
    for heading in ("elements", *(f"{group.name}\n{group.size:,}" for group in few)):
        table.add_column(heading, overflow="crop" if heading == "elements" else "fold", vertical="bottom")
    if len(plan.groups) > len(few):
        table.add_column(f"{len(plan.groups) - len(few)} more")
    for bank, group in enumerate(plan.groups):
        for slot in group.slots:
            bar = "█" * max(1, round(widest * slot.numel / largest))
            cells = [""] * min(bank, len(few)) + [f"[{_colour(bank)}]{bar}[/]"]
            table.add_row(escape(slot.name), f"{slot.numel:,}", *cells)
    for what, parts in _split(plan).items():
        table.add_row(f"[dim]{what}[/]", "", *(f"[dim]{part:.0%}[/]" for part in parts[: len(few)]))
    return table


def _split(plan: Plan) -> dict[str, list[float]]:
    """Each bank's fraction of the weights' elements, and of the budget."""
    return {
        "of the weights": [group.numel / plan.numel for group in plan.groups],
        "of the budget": [group.parameters / plan.parameters for group in plan.groups],
    }


def check_picture(path: str | os.PathLike[str]) -> Path:
    """The path of a PNG file.

    Raises:
        UserError: the name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"the picture's file must end in .png, got {os.fspath(path)!r}")
    return Path(path)


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draws weights × banks as a PNG: a bar in the bank that a weight reads, as long as the weight's elements.

    Each bank's size is written above it. Below are each bank's fractions of the budget (filled) and of the weights' elements
    (outlined).

    Raises:
        UserError: the file is no PNG by its name, or cannot be written.
    """
    path = check_picture(path)
    slots = [(bank, slot) for bank, group in enumerate(plan.groups) for slot in group.slots]
    largest = max(slot.numel for _, slot in slots)
    banks = len(plan.groups)
    size = (min(30.0, 3.5 + 0.9 * banks), min(60.0, 2.4 + 0.22 * len(slots)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes, below = figure.subplots(2, height_ratios=[size[1] - 1.4, 1.0], sharex=True)
    for row, (bank, slot) in enumerate(slots):
        width = max(0.04, 0.9 * slot.numel / largest)
        cell = Rectangle((bank + 0.05, row + 0.1), width, 0.8, facecolor=to_hex(_colour(bank)), edgecolor="none")
        axes.add_patch(cell)
    axes.set_xlim(0, banks)
    axes.set_ylim(len(slots), 0)
    axes.set_xticks([bank + 0.5 for bank in range(banks)])
    axes.set_xticklabels([f"{group.name}\n{group.size:,}" for group in plan.groups], fontsize=7)
    axes.xaxis.tick_top()
    axes.set_yticks([row + 0.5 for row in range(len(slots))])
    axes.set_yticklabels([slot.name for _, slot in slots], fontsize=6)
    axes.tick_params(length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    title = (
        f"{plan.numel:,} elements of weights from {plan.parameters:,} parameters ({plan.parameters / plan.numel:.1%})"
    )
    axes.set_title(title, fontsize=8)
    elements, budget = _split(plan).values()
    places = np.arange(banks)
    below.bar(places + 0.3, elements, 0.36, facecolor="none", edgecolor="#555555")
    below.bar(places + 0.7, budget, 0.36, color=[_colour(bank) for bank in range(banks)])
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.tick_params(labelsize=6, length=0, labelbottom=False)
    below.set_xlabel("of the weights (outlined), of the budget (filled)", fontsize=7)
    below.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error}") from error
    return path
