"""Plots of loss, drawn without pyplot, so that no global state, window or backend is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from dist_ssn.errors import UserError

# Okabe and Ito's palette, which colour-blind readers can distinguish; styles and markers differ too, for print in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_loss_against_bytes(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Validation loss against the bytes that each rank has sent, on a logarithmic axis, as a PNG.

    Args:
        runs: dicts with `name` and `history`, a list of dicts with `ring_bytes` and `validation_loss` (nats).
        path: the PNG file.

    Raises:
        UserError: no run has sent anything (each was a single process), or the file cannot be written.
    """
    return _plot(runs, path, "ring_bytes", "bytes sent per rank since the start (ring all-reduce, logarithmic)")


def plot_loss_against_steps(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Validation loss against steps, as a PNG; arguments and errors as in `plot_loss_against_bytes`."""
    return _plot(runs, path, "step", "step")


def plot_loss_against_seconds(
    runs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], label: str = "seconds since the start"
) -> Path:
    """Validation loss against `seconds`, as a PNG; arguments and errors as in `plot_loss_against_bytes`."""
    return _plot(runs, path, "seconds", label)


def _plot(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], x: str, label: str) -> Path:
    logarithmic = x == "ring_bytes"
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    lines = []
    for index, run in enumerate(runs):
        points = [
            (point[x], point["validation_loss"])
            for point in run["history"]
            if point["validation_loss"] is not None and (point[x] > 0 or not logarithmic)
        ]
        if points:
            lines.append((index, str(run["name"]).replace("$", r"\$"), points))  # no formula
    if not lines:
        names = ", ".join(str(run["name"]) for run in runs) or "no runs"
        why = " with several processes, and a single process sends nothing" if logarithmic else ""
        raise UserError(f"there is nothing to plot: none of the runs ({names}) has evaluations{why}")
    for index, name, points in lines:
        axes.plot(
            *zip(*points, strict=True),
            label=f"{name} ({points[-1][1]:.3f})",
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_STYLES[index % len(_STYLES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.8,
        )
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    elif x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss (nats)")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="run (last loss)", frameon=False, alignment="left")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})  # the same data, the same bytes
    except OSError as error:
        raise UserError(f"cannot write the plot {path}: {error}") from error
    return path
