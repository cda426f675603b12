"""Tables and plots, made only from the files that runs write."""

from __future__ import annotations

from dist_ssn.report.compare import draw, read_rows, report
from dist_ssn.report.plot import plot_loss_against_bytes, plot_loss_against_steps
from dist_ssn.report.table import human_bytes, human_number, summary_table

__all__ = [
    "draw",
    "human_bytes",
    "human_number",
    "plot_loss_against_bytes",
    "plot_loss_against_steps",
    "read_rows",
    "report",
    "summary_table",
]
