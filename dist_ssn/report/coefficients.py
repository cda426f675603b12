"""Learned coefficients, with which weights mix their templates: a row per weight, as a picture and for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from dist_ssn.errors import PlanError, UserError
from dist_ssn.files import read_tensors, read_text
from dist_ssn.plan import Plan
from dist_ssn.train.checkpoint.folder import latest

_MOST_COLUMNS = 12

Coefficients = Mapping[str, np.ndarray]
"""Weight name → its coefficients [c]; c may differ between weights."""


def read_coefficients(folder: Path) -> Coefficients:
    """Coefficients in the newest checkpoint of a run; none if it is dense, has no checkpoint, or its weights have none.

    Args:
        folder: the run's.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    checkpoint = latest(folder / "checkpoints")
    if checkpoint is None:
        return {}
    try:
        text = read_text(checkpoint / "plan.json")
        if text.strip() == "null":
            return {}
        plan, tensors = Plan.from_json(text), read_tensors(checkpoint / "model.safetensors")
        found = {}
        for group in plan.groups:
            if sizes := [slot.coefficients for slot in group.slots if slot.coefficients]:
                flat = tensors[f"dist_ssn.{group.name}.coefficients"].float().numpy()
                parts = np.split(flat, np.cumsum(sizes)[:-1])
                found |= dict(zip((slot.name for slot in group.slots if slot.coefficients), parts, strict=True))
        return found
    except (OSError, ValueError, KeyError, PlanError) as error:
        raise UserError(f"the coefficients in {checkpoint} cannot be read ({type(error).__name__}: {error})") from None


def coefficients_table(coefficients: Coefficients, title: str) -> Table:
    """Table with a row per weight: positive values are blue, negative ones red, and larger ones stronger."""
    most = max(len(row) for row in coefficients.values())
    shown = min(most, _MOST_COLUMNS)
    largest = max(float(np.abs(row).max()) for row in coefficients.values()) or 1.0
    table = Table("weight", title=title, box=None, padding=(0, 1, 0, 0))
    for number in range(shown):
        table.add_column(str(number), justify="right")
    if most > shown:
        table.add_column(f"{most - shown} more")
    for name, row in coefficients.items():
        table.add_row(escape(name), *(_coloured(float(value), largest) for value in row[:shown]))
    return table


def _coloured(value: float, largest: float) -> str:
    pale = 255 - round(155 * min(1.0, abs(value) / largest))
    colour = f"#{pale:02x}{pale:02x}ff" if value > 0 else f"#ff{pale:02x}{pale:02x}"
    return f"[{colour}]{value:.2f}[/]"


def draw_coefficients(coefficients: Coefficients, path: str | os.PathLike[str], title: str) -> Path:
    """Draws weights × coefficients as a PNG: blue above 0, red below, white where a weight has no such coefficient.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    grid = np.full((len(coefficients), max(len(row) for row in coefficients.values())), np.nan)
    for place, row in enumerate(coefficients.values()):
        grid[place, : len(row)] = row
    largest = float(np.nanmax(np.abs(grid))) or 1.0
    size = (min(30.0, 4 + 0.25 * grid.shape[1]), min(60.0, 1.2 + 0.22 * len(grid)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(grid)), labels=list(coefficients), fontsize=6)
    axes.set_xlabel("coefficient", fontsize=7)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_title(title, fontsize=8)
    figure.colorbar(image).ax.tick_params(labelsize=6)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error}") from error
    return path
