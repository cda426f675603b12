"""Reports of runs and measurements, as tables on the terminal, and as a page, Markdown and pictures: `dist-ssn report`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from dist_ssn.errors import UserError
from dist_ssn.files import read_json
from dist_ssn.report.coefficients import Coefficients, coefficients_table, draw_coefficients, read_coefficients
from dist_ssn.report.page import Grid, Page, Picture, ledger_grid, prediction_grid, runs_grid
from dist_ssn.report.plot import plot_loss_against_bytes, plot_loss_against_seconds, plot_loss_against_steps
from dist_ssn.report.results import result_files, results_grid
from dist_ssn.report.table import columns_of, describe_value, human_bytes, is_number, summary_table

BANDWIDTHS = (10, 100, 1000)
"""Mbit/s at which a run's time is modelled."""
_POINT = ("step", "ring_bytes", "validation_loss")
_BESIDE = ("ring_bytes_by_purpose", "prediction", "seconds", "exposed_seconds")
_REQUIRED = (
    "parameters",
    "optimizer_bytes",
    "bytes_per_step_logical",
    "bytes_per_step_ring",
    "total_bytes",
    "ms_per_step",
    "validation_loss",
)

_OF_SOME = ("validation_accuracy", "agreement", "waiting")


@dataclass(frozen=True)
class _Summary:
    """A summary and its rows."""

    file: Path
    rows: Sequence[dict[str, Any]]


def read_rows(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The rows of runs, from their `summary.json`; warns of those that are left out.

    Args:
        paths: summaries, folders of runs, or folders of folders of runs.

    Raises:
        UserError: a path has no summary, or no summary can be read; the message names the missing field.
    """
    summaries, left_out = _read([Path(path) for path in paths])
    if not summaries:
        raise UserError(_nothing(left_out))
    for sentence in left_out:
        warnings.warn(f"left out: {sentence}", stacklevel=2)
    return [row for summary in summaries for row in summary.rows]


def _read(paths: Sequence[Path]) -> tuple[list[_Summary], list[str]]:
    """The whole summaries, and a sentence on each that is left out.

    Raises:
        UserError: a path does not exist.
    """
    found: dict[Path, _Summary] = {}
    left_out: list[str] = []
    for path in paths:
        try:
            files = _files(path)
        except UserError as error:
            if not path.exists():
                raise
            left_out.append(str(error))
            continue
        left_out += [f"{folder} has no summary.json, so its run has not ended" for folder in _cut(path)]
        for file in files:
            if file not in found:
                try:
                    found[file] = _Summary(file, _rows_of(file))
                except UserError as error:
                    left_out.append(str(error))
    return list(found.values()), left_out


def _nothing(left_out: Sequence[str]) -> str:
    """Message for paths of which nothing can be reported."""
    advice = "there are no runs to report: give the folders that dist-ssn train wrote, such as runs/quickstart"
    return "; ".join(left_out) or advice


def _tables(paths: Sequence[Path]) -> tuple[dict[Path, Grid], list[str]]:
    """Tables of benchmarks' results, and a sentence on each path that is left out.

    Raises:
        UserError: a path does not exist.
    """
    tables: dict[Path, Grid] = {}
    left_out: list[str] = []
    for path in paths:
        try:
            tables[path] = results_grid(path)
        except UserError as error:
            if not path.exists():
                raise
            left_out.append(str(error))
    return tables, left_out


def _rows_of(file: Path) -> list[dict[str, Any]]:
    """The checked rows of a summary.

    Raises:
        UserError: it cannot be read, or has another form.
    """
    try:
        content = read_json(file)
        found = content["rows"]
        if not isinstance(found, list):
            raise TypeError(f"rows is {describe_value(found)}, not a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file} is not a summary of runs ({type(error).__name__}: {error}): expected {{"rows": [...]}}, '
            f"as dist-ssn train writes it"
        ) from None
    if not found:
        raise UserError(f"{file} has no rows: there are no runs to report in it")
    for number, row in enumerate(found):
        _check(row, f"{file}, row {number}")
    rows = [{key: value for key, value in row.items() if key not in _BESIDE} for row in found]
    return [{**rows[0], **_beside(content)}] if len(rows) == 1 else rows


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


def _cut(path: Path) -> list[Path]:
    """Folders of runs without a summary in a folder of runs."""
    if path.is_file() or (path / "summary.json").is_file():
        return []
    return sorted(file.parent for file in path.glob("*/metrics.jsonl") if not (file.parent / "summary.json").is_file())


def _not_wandb(path: Path) -> str:
    """Message for a path of W&B's log; W&B's folder lies in the run's, unless WANDB_DIR names another place."""
    parents = (*path.parents, *path.resolve().parents)
    run = next((str(folder) for folder in parents if (folder / "summary.json").is_file()), None)
    where = (
        f"give the run's folder, {run}" if run else "give the run's folder, where summary.json and metrics.jsonl lie"
    )
    return f"{path} is W&B's log of a run, which dist-ssn does not read: {where}"


def _beside(content: dict[str, Any]) -> dict[str, Any]:
    """Facts that the summary of a single run has besides its row, `_BESIDE`: bytes by purpose, seconds, seconds of waiting."""
    purposes, seconds, ledger = (content.get(key) for key in ("ring_bytes_by_purpose", "seconds", "ledger"))
    found: dict[str, Any] = {}
    if isinstance(purposes, dict) and all(is_number(count) for count in purposes.values()):
        found["ring_bytes_by_purpose"] = purposes
    if isinstance(content.get("prediction"), list):
        found["prediction"] = content["prediction"]
    rows = [row for row in ledger if isinstance(row, dict)] if isinstance(ledger, list) else []
    # Without the waiting time of a collective, all of its time counts; on CUDA there is no time at all.
    waits = [row.get("seconds" if row.get("exposed_seconds") is None else "exposed_seconds") for row in rows]
    known = [wait for wait in waits if is_number(wait)]
    if is_number(seconds) and len(known) == len(rows):
        found |= {"seconds": seconds, "exposed_seconds": min(seconds, sum(known))}
    return found


def _check(row: Any, where: str) -> None:
    """Checks every value of a row that a report shows.

    Raises:
        UserError: one is missing or of another type.
    """
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise UserError(f"{where} has no name: expected what dist-ssn train writes")
    where = f"{where} ({row['name']})"
    _check_numbers(row, _REQUIRED, where, may_be_null=("validation_loss",))
    _check_numbers(dict.fromkeys(_OF_SOME) | row, _OF_SOME, where, _OF_SOME)
    history = row.get("history")
    if not isinstance(history, list | None):
        raise UserError(f"{where}: history is {describe_value(history)}, expected a list of evaluations")
    for number, point in enumerate(history or ()):
        if not isinstance(point, dict):
            text = "expected an object with step, ring_bytes and validation_loss"
            raise UserError(f"{where}: history[{number}] is {describe_value(point)}, {text}")
        keys = (*_POINT, "seconds") if "seconds" in point else _POINT
        _check_numbers(point, keys, f"{where}, history[{number}]", may_be_null=("validation_loss",))


def _check_numbers(values: dict[str, Any], keys: Sequence[str], where: str, may_be_null: Sequence[str] = ()) -> None:
    for key in keys:
        if key not in values:
            raise UserError(f"{where}: {key} is missing, expected a number")
        value = values[key]
        if not is_number(value) and not (value is None and key in may_be_null):
            raise UserError(f"{where}: {key} is {describe_value(value)}, expected a number")


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
        UserError: a path does not exist, nothing can be reported (see `read_rows` and `results_grid`), or a file cannot be written.
    """
    console = console or Console()
    given = [Path(path) for path in paths]
    of_results = [path for path in given if result_files(path)]
    of_runs = [path for path in given if path not in of_results or any(path.glob("*/summary.json"))]
    summaries, left_out = _read(of_runs)
    tables, odd = _tables(of_results)
    left_out += odd
    if not summaries and not tables:
        raise UserError(_nothing(left_out))
    rows = [row for summary in summaries for row in summary.rows]
    coefficients, damaged = _coefficients(summaries)
    results, grids = list(tables), list(tables.values())
    for sentence in (*left_out, *damaged):
        console.print(f"left out: {sentence}", highlight=False, markup=False, soft_wrap=True)
    if rows:
        console.print(summary_table(rows))
    for grid in grids:
        console.print(grid.terminal())
    if len(rows) == 1:  # for several runs, only the page shows them
        for name, found in coefficients.items():
            console.print(coefficients_table(found, escape(f"coefficients of {name}")))
    if output is None:
        return []
    folder = Path(output)
    pictures = [*draw(rows, folder), *_draw_coefficients(coefficients, folder)]
    page = _page(rows, pictures, results, grids, left_out)
    written = [folder / picture.file for picture in pictures]
    for name, text in (("index.html", page.html()), ("report.md", page.markdown())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror}") from None
        written.append(folder / name)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return written


def _page(
    rows: Sequence[dict[str, Any]],
    pictures: Sequence[Picture],
    results: Sequence[Path],
    grids: Sequence[Grid],
    left_out: Sequence[str],
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
        " ".join(
            [f"{contents}, from the files that they wrote: {names}.", *(f"Left out: {text}." for text in left_out)]
        ),
        [part for part in parts if part is not None],
    )


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Picture]:
    """The plots of runs that have evaluations; those against bytes, and at a bandwidth, only if a run has sent something."""
    runs = [row for row in rows if any(point["validation_loss"] is not None for point in row.get("history") or ())]
    made: list[Picture] = []
    if not runs:
        return made
    points = [point for run in runs for point in run["history"] if point["validation_loss"] is not None]
    sent = any(point["ring_bytes"] > 0 for point in points)
    if sent:
        plot_loss_against_bytes(runs, folder / "loss_against_bytes.png")
        made.append(
            _picture("loss_against_bytes.png", "bytes that each rank has sent", runs, "ring_bytes", human_bytes)
        )
    plot_loss_against_steps(runs, folder / "loss_against_steps.png")
    made.append(_picture("loss_against_steps.png", "steps", runs, "step", lambda step: f"{step:,} steps"))
    if all("seconds" in point for run in runs for point in run["history"]):
        plot_loss_against_seconds(runs, folder / "loss_against_seconds.png")
        made.append(
            _picture("loss_against_seconds.png", "seconds, as each run took", runs, "seconds", lambda s: f"{s:,.0f} s")
        )
        for mbit in BANDWIDTHS if sent and all(run.get("seconds") for run in runs) else ():
            there = [modelled(run, mbit) for run in runs]
            file, link = f"loss_at_{mbit}_mbit.png", f"{mbit:,} Mbit/s"
            plot_loss_against_seconds(there, folder / file, f"seconds at {link} (modelled)")
            caption = f"seconds at {link}: each run's compute plus the transfer of its bytes, nothing overlapped"
            made.append(_picture(file, caption, there, "seconds", lambda s: f"{s:,.0f} s"))
    return made


def _coefficients(summaries: Sequence[_Summary]) -> tuple[dict[str, Coefficients], list[str]]:
    """Coefficients in each run's last checkpoint, by the run's folder; and a sentence on each damaged checkpoint.

    Runs without coefficients are left out.
    """
    found: dict[str, Coefficients] = {}
    damaged: list[str] = []
    for folder in (summary.file.resolve().parent for summary in summaries if summary.file.name == "summary.json"):
        try:
            coefficients = read_coefficients(folder)
        except UserError as error:  # the rest of the report needs no checkpoint
            damaged.append(str(error))
            continue
        if coefficients:
            found[folder.name if folder.name not in found else f"{folder.name}-{len(found) + 1}"] = coefficients
    return found, damaged


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
    caption = f"Validation loss against {against}. Each line begins at the run's first evaluation, not at step 0."
    return Picture(file, caption, f"Lines of validation loss: {'; '.join(ends)}.")
