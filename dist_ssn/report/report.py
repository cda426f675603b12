"""`dist-ssn report`: the runs' files, as a table and two plots."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_ssn.errors import UserError

from .plot import plot_loss_against_bytes, plot_loss_against_steps
from .table import summary_table

_NUMBERS = (
    "parameters",
    "optimizer_bytes",
    "bytes_per_step_logical",
    "bytes_per_step_ring",
    "total_bytes",
    "ms_per_step",
    "validation_loss",
)


def read_rows(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The rows of runs, from their `summary.json`.

    Args:
        paths: summaries, folders of runs, or folders of folders of runs.

    Raises:
        UserError: a path has no summary, or one that cannot be read; says which field is missing.
    """
    rows = []
    for file in dict.fromkeys(file for path in paths for file in _summaries(Path(path))):
        try:
            found = json.loads(file.read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{file} is not a summary of runs ({type(error).__name__}: {error}): expected {{"rows": [...]}}, '
                f"as dist-ssn train writes it"
            ) from None
        for number, row in enumerate(found):
            _check(row, f"{file}, row {number}")
            rows.append(row)
    if not rows:
        raise UserError(
            "there are no runs to report: give the folders that dist-ssn train wrote, such as runs/quickstart"
        )
    return rows


def _summaries(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "summary.json").is_file():
        return [path / "summary.json"]
    if found := sorted(path.glob("*/summary.json")):
        return found
    raise UserError(
        f"there is no summary.json in {path}: give the folder of a finished run, or a folder of such folders"
    )


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UserError(f"{where} has no name: expected what dist-ssn train writes")
    for key in _NUMBERS:
        value = row.get(key)
        if not isinstance(value, int | float) and not (value is None and key == "validation_loss" and key in row):
            raise UserError(f"{where} ({row['name']}): {key} is {value!r}, expected a number")


def report(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Prints the comparing table of runs, and draws their losses against bytes sent and against steps.

    Args:
        paths: see `read_rows`.
        output: folder for `loss_against_bytes.png` and `loss_against_steps.png`; None draws nothing.

    Returns: the files written; there is no plot against bytes when every run was a single process, which sends nothing.

    Raises:
        UserError: see `read_rows`; or a plot cannot be written.
    """
    console = console or Console()
    rows = read_rows(paths)
    console.print(summary_table(rows))
    if output is None:
        return []
    runs = [row for row in rows if row.get("history")]
    written = []
    if any(point["ring_bytes"] for run in runs for point in run["history"]):
        written.append(plot_loss_against_bytes(runs, Path(output) / "loss_against_bytes.png"))
    if runs:
        written.append(plot_loss_against_steps(runs, Path(output) / "loss_against_steps.png"))
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return written
