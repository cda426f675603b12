"""Reports of runs and measurements, as tables on the terminal, and as a page, Markdown and pictures: `dist-ssn report`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_ssn.errors import UserError
from dist_ssn.report.coefficients import Coefficients, coefficients_table, draw_coefficients, read_coefficients
from dist_ssn.report.page import Grid, Page, Picture, ledger_grid, prediction_grid, runs_grid
from dist_ssn.report.plot import plot_loss_against_bytes, plot_loss_against_seconds, plot_loss_against_steps
from dist_ssn.report.results import result_files, results_grid
from dist_ssn.report.table import columns_of, human_bytes, summary_table

BANDWIDTHS = (10, 100, 1000)
"""Mbit/s at which a run's time is modelled."""
_REQUIRED = (
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
        UserError: a path has no summary, or one that cannot be read; the message names the missing field.
    """
    rows = []
    for file in dict.fromkeys(file for path in paths for file in _files(Path(path))):
        try:
            content = json.loads(file.read_text())
            found = content["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{file} is not a summary of runs ({type(error).__name__}: {error}): expected {{"rows": [...]}}, '
                f"as dist-ssn train writes it"
            ) from None
        for number, row in enumerate(found):
            _check(row, f"{file}, row {number}")
            rows.append({**row, **_beside(content)} if len(found) == 1 else row)
    if not rows:
        raise UserError(
            "there are no runs to report: give the folders that dist-ssn train wrote, such as runs/quickstart"
        )
    return rows


def _files(path: Path) -> list[Path]:
    """The summaries at `path`: the file itself, or those in the folder."""
    if path.suffix == ".wandb":
        raise UserError(_not_wandb(path))
    if path.is_file():
        return [path]
    if (path / "summary.json").is_file():
        return [path / "summary.json"]
    if found := sorted(path.glob("*/summary.json")):
        return found
    if any(path.glob("run-*.wandb")) or any(path.glob("*run-*/run-*.wandb")):
        raise UserError(_not_wandb(path))
    raise UserError(
        f"there is no summary.json in {path}: give the folder of a finished run, a folder of such folders, or results of a "
        "benchmark"
    )


def _not_wandb(path: Path) -> str:
    """Message for a path of W&B's log; W&B's folder lies in the run's, unless WANDB_DIR names another place."""
    parents = (*path.parents, *path.resolve().parents)
    run = next((str(folder) for folder in parents if (folder / "summary.json").is_file()), None)
    where = (
        f"give the run's folder, {run}" if run else "give the run's folder, where summary.json and metrics.jsonl lie"
    )
    return f"{path} is W&B's log of a run, which dist-ssn does not read: {where}"


def _beside(content: dict[str, Any]) -> dict[str, Any]:
    """Facts that the summary of a single run has besides its row: bytes by purpose, seconds, and seconds of waiting."""
    purposes, seconds, ledger = (content.get(key) for key in ("ring_bytes_by_purpose", "seconds", "ledger"))
    found: dict[str, Any] = {}
    if isinstance(purposes, dict) and all(isinstance(count, int | float) for count in purposes.values()):
        found["ring_bytes_by_purpose"] = purposes
    if isinstance(content.get("prediction"), list):
        found["prediction"] = content["prediction"]
    rows = [row for row in ledger if isinstance(row, dict)] if isinstance(ledger, list) else []
    # Without the waiting time of a collective, all of its time counts; on CUDA there is no time at all.
    waits = [row.get("seconds" if row.get("exposed_seconds") is None else "exposed_seconds") for row in rows]
    known = [wait for wait in waits if isinstance(wait, int | float)]
    if isinstance(seconds, int | float) and len(known) == len(rows):
        found |= {"seconds": seconds, "exposed_seconds": min(seconds, sum(known))}
    return found


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UserError(f"{where} has no name: expected what dist-ssn train writes")
    for key in _REQUIRED:
        value = row.get(key)
        if not isinstance(value, int | float) and not (value is None and key == "validation_loss" and key in row):
            raise UserError(f"{where} ({row['name']}): {key} is {value!r}, expected a number")


def report(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Prints a table that compares runs, and writes it into a folder with plots of their losses and their bytes by purpose.

    Learned coefficients of a run's weights are shown, too.

    Args:
        paths: see `read_rows`; or results of benchmarks (`*.jsonl`, or a folder of such files), which become further tables.
        output: folder for `index.html`, `report.md` and the PNGs that they show; None writes nothing.
        console: prints the tables; None: standard output.

    Returns:
        The files written. There is no plot against bytes if every run was a single process, which sends nothing.

    Raises:
        UserError: see `read_rows` and `results_grid`; or a file cannot be written.
    """
    console = console or Console()
    results = [Path(path) for path in paths if result_files(Path(path))]
    runs = [path for path in paths if Path(path) not in results]
    rows = read_rows(runs) if runs or not results else []
    coefficients = _coefficients(runs, console)
    grids = [results_grid(path) for path in results]
    if rows:
        console.print(summary_table(rows))
    for grid in grids:
        console.print(grid.terminal())
    if len(rows) == 1:  # for several runs, only the page shows them
        for name, found in coefficients.items():
            console.print(coefficients_table(found, f"coefficients of {name}"))
    if output is None:
        return []
    folder = Path(output)
    pictures = [*draw(rows, folder), *_draw_coefficients(coefficients, folder)]
    page = _page(rows, pictures, results, grids)
    written = [folder / picture.file for picture in pictures]
    for name, text in (("index.html", page.html()), ("report.md", page.markdown())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror}") from None
        written.append(folder / name)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return written


def _page(
    rows: Sequence[dict[str, Any]], pictures: Sequence[Picture], results: Sequence[Path], grids: Sequence[Grid]
) -> Page:
    """The page with all parts, in their order."""
    ledgers = {str(row["name"]): row["ring_bytes_by_purpose"] for row in rows if row.get("ring_bytes_by_purpose")}
    parts = [
        runs_grid(columns_of(rows), rows) if rows else None,
        *pictures,
        ledger_grid(ledgers),
        prediction_grid(rows),
        *grids,
    ]
    names = ", ".join([*(str(row["name"]) for row in rows), *(str(path) for path in results)])
    counts = [(len(rows), "run", "runs"), (len(results), "set of results", "sets of results")]
    contents = " and ".join(f"{count} {one if count == 1 else more}" for count, one, more in counts if count)
    return Page(
        "Runs compared",
        f"{contents}, from the files that they wrote: {names}.",
        [part for part in parts if part is not None],
    )


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Picture]:
    """The plots of runs that have a history."""
    runs = [row for row in rows if row.get("history")]
    made: list[Picture] = []
    if any(point["ring_bytes"] for run in runs for point in run["history"]):
        plot_loss_against_bytes(runs, folder / "loss_against_bytes.png")
        made.append(
            _picture("loss_against_bytes.png", "bytes that each rank has sent", runs, "ring_bytes", human_bytes)
        )
    if not runs:
        return made
    plot_loss_against_steps(runs, folder / "loss_against_steps.png")
    made.append(_picture("loss_against_steps.png", "steps", runs, "step", lambda step: f"{step:,} steps"))
    if all("seconds" in point for run in runs for point in run["history"]):
        plot_loss_against_seconds(runs, folder / "loss_against_seconds.png")
        made.append(
            _picture("loss_against_seconds.png", "seconds, as each run took", runs, "seconds", lambda s: f"{s:,.0f} s")
        )
        for mbit in BANDWIDTHS if all(run.get("seconds") for run in runs) else ():
            there = [modelled(run, mbit) for run in runs]
            file, link = f"loss_at_{mbit}_mbit.png", f"{mbit:,} Mbit/s"
            plot_loss_against_seconds(there, folder / file, f"seconds at {link} (modelled)")
            caption = f"seconds at {link}: each run's compute plus the transfer of its bytes, nothing overlapped"
            made.append(_picture(file, caption, there, "seconds", lambda s: f"{s:,.0f} s"))
    return made


def _coefficients(paths: Sequence[str | os.PathLike[str]], console: Console) -> dict[str, Coefficients]:
    """Coefficients in each run's last checkpoint, by the run's folder.

    Runs without coefficients are left out; so are damaged checkpoints, with a line on the console.
    """
    files = dict.fromkeys(file for path in paths for file in _files(Path(path)))
    found: dict[str, Coefficients] = {}
    for folder in (file.resolve().parent for file in files if file.name == "summary.json"):
        try:
            coefficients = read_coefficients(folder)
        except UserError as error:  # the rest of the report needs no checkpoint
            console.print(f"left out: {error}", highlight=False, markup=False, soft_wrap=True)
            continue
        if coefficients:
            found[folder.name if folder.name not in found else f"{folder.name}-{len(found) + 1}"] = coefficients
    return found


def _draw_coefficients(coefficients: dict[str, Coefficients], folder: Path) -> list[Picture]:
    pictures = []
    for name, found in coefficients.items():
        file, title = f"coefficients_{name}.png", f"Coefficients of {name}, by weight."
        draw_coefficients(found, folder / file, title)
        pictures.append(Picture(file, title, f"A row for each of {len(found)} weights, a colour for each coefficient."))
    return pictures


def modelled(run: dict[str, Any], mbit: float) -> dict[str, Any]:
    """The run with modelled seconds: its compute plus the transfer of its bytes at `mbit` Mbit/s, without overlap.

    Runs with different overlap settings become comparable by this.
    """
    waited = run["exposed_seconds"] / run["seconds"]
    history = [
        {**point, "seconds": (1 - waited) * point["seconds"] + 8e-6 * point["ring_bytes"] / mbit}
        for point in run["history"]
    ]
    return {**run, "history": history}


def _picture(
    file: str, against: str, runs: Sequence[dict[str, Any]], key: str, shown: Callable[[float], str]
) -> Picture:
    ends = []
    for run in runs:
        points = [point for point in run["history"] if point["validation_loss"] is not None]
        if points:
            ends.append(f"{run['name']} ends at {points[-1]['validation_loss']:.3f} after {shown(points[-1][key])}")
    return Picture(file, f"Validation loss against {against}.", f"Lines of validation loss: {'; '.join(ends)}.")
