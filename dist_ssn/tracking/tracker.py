"""Trackers: receivers of a run's metrics. Only rank 0 has any; the other ranks have an empty list."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_ssn.errors import UserError
from dist_ssn.files import replace_text
from dist_ssn.tracking.wandb_settings import Draw, WandbSettings, wandb_mode


class Tracker(Protocol):
    """Receives the metrics and tables of a run."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the metrics of one step; those under "validation_…" mark an evaluation."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table, such as the plan or the ledger."""

    def close(self, row: Mapping[str, Any] | None) -> None:
        """Ends the run.

        Args:
            row: the run's row of the table that compares runs; None if it failed.
        """


class JsonLines:
    """One JSON object per line, written at once, so that a killed run loses nothing.

    Args:
        path: the file; its folder is made.
        resume_step: None starts a new file. A number keeps the lines up to that step; it drops later lines of a killed run,
            whose steps are run again, and an incomplete last line.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = []
            if resume_step is not None and path.exists():
                kept = _lines_until(path.read_text(encoding="utf-8", errors="replace"), resume_step)
            replace_text(path, "".join(kept))
        except OSError as error:
            raise UserError(f"cannot write the metrics to {path}: {error}; give another folder as output") from error
        self._path = path

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line with the step and its metrics."""
        self._write({"step": step, **values})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a line with the table."""
        self._write({"table": name, "rows": [dict(row) for row in rows]})

    def close(self, row: Mapping[str, Any] | None) -> None:
        """Does nothing: no file is open between two lines."""

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write the metrics to {self._path}: {error}; free some disk space and resume"
            ) from error


def _lines_until(text: str, step: int) -> list[str]:
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # an incomplete line of a killed run
        at = record.get("step") if isinstance(record, dict) else None
        if line.endswith("\n") and isinstance(at, int) and at <= step:
            kept.append(line)
    return kept


def jsonable(value: Any) -> Any:
    """`value` with NaN and infinity as None, which JSON lacks, and tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def set_aside(folder: Path) -> Path | None:
    """Moves the folder of a former run of this name to `old/<name>.<number>` beside it, so that a new start loses nothing.

    Returns:
        The new path; None if there was no former run.
    """
    if not (folder / "metrics.jsonl").exists():
        return None
    (folder.parent / "old").mkdir(exist_ok=True)
    taken = {path.name for path in (folder.parent / "old").iterdir()}
    number = next(n for n in range(1, len(taken) + 2) if f"{folder.name}.{n}" not in taken)
    aside = folder.parent / "old" / f"{folder.name}.{number}"
    os.replace(folder, aside)
    return aside


class Console:
    """A progress bar on a terminal; elsewhere one line per evaluation."""

    def __init__(self, name: str, steps: int, folder: Path, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole()
        self._name, self._steps, self._folder = name, steps, folder
        self._progress: Progress | None = None

    @property
    def live(self) -> bool:
        """True if the console is a terminal, where `advance` shows a bar."""
        return self._console.is_terminal

    def advance(self, step: int, loss: float, samples_per_second: float, mb_per_step: float) -> None:
        """Moves the bar, on a terminal."""
        if not self.live:
            return
        figures = self._shown(f"loss {loss:.4f} · {samples_per_second:,.0f} samples/s · {mb_per_step:.3g} MB sent/step")
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.add_task(self._shown(self._name), total=self._steps, completed=step, figures=figures)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, figures=figures)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Prints a line if the step has an evaluation."""
        if "validation_loss" not in values:
            return
        parts = [f"{self._name}: step {step}/{self._steps}", f"validation loss {values['validation_loss']:.4f}"]
        if (accuracy := values.get("validation_accuracy")) is not None:
            parts.append(f"accuracy {accuracy:.2%}")
        if (loss := values.get("train_loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        parts.append(f"{values['samples_per_second']:,.0f} samples/s")
        parts.append(f"{values['ring_bytes'] / 1e6:,.1f} MB sent")
        self.note(" · ".join(parts))

    def note(self, sentence: str) -> None:
        """Prints a line of text, above the bar if there is one."""
        self._console.print(self._shown(sentence), highlight=False, markup=False, soft_wrap=True)

    def _shown(self, text: str) -> str:
        """The text with a question mark for each character that the console lacks: a script's may be ASCII."""
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Does nothing: tables go to the files."""

    def close(self, row: Mapping[str, Any] | None) -> None:
        """Ends the bar, and prints the run's figures."""
        if self._progress is not None:
            self._progress.stop()
        if row is not None:
            self.note(
                f"{self._name}: {row['parameters']:,} parameters · validation loss {row['validation_loss']:.4f} · "
                f"{row['bytes_per_step_ring'] / 1e6:.3g} MB sent per step, {row['total_bytes'] / 1e6:,.1f} MB in all · "
                f"{row['ms_per_step']:.0f} ms per step · {self._folder}"
            )


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the metrics of one step to each tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table to each tracker."""
        for tracker in self._trackers:
            tracker.table(name, rows)

    def close(self, row: Mapping[str, Any] | None) -> None:
        """Closes each tracker."""
        for tracker in self._trackers:
            tracker.close(row)


def check_wandb(config: WandbSettings) -> None:
    """Checks that W&B can be used, if the settings ask for it.

    Raises:
        UserError: W&B is not installed, or its mode is unknown.
    """
    mode = wandb_mode(config, os.environ)
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"the W&B mode is {mode!r} and wandb is not installed: run `pip install dist_ssn[wandb]`, "
            f"or set wandb.mode (and WANDB_MODE, if it is set) to disabled"
        )


def build_tracker(
    config: WandbSettings,
    folder: Path,
    *,
    name: str,
    recipe: Mapping[str, Any],
    console: Console | None,
    resume_step: int | None,
    draw: Draw | None = None,
) -> Trackers:
    """The trackers of rank 0: `folder/metrics.jsonl`, W&B if asked for, and the console if there is one.

    Args:
        config: settings of W&B.
        folder: the run's folder.
        name: the run's name.
        recipe: the run's recipe, as W&B shows it.
        console: shows progress.
        resume_step: the step from which a run resumes; None: a new run.
        draw: draws the pictures that W&B gets at the end; None: no pictures.

    Raises:
        UserError: the folder cannot be written, wandb is missing or does not start.
    """
    trackers: list[Tracker] = []
    if (mode := wandb_mode(config, os.environ)) != "disabled":
        from dist_ssn.tracking.wandb_tracker import WandbTracker

        trackers.append(
            WandbTracker(config, mode, folder, name=name, recipe=recipe, resume=resume_step is not None, draw=draw)
        )
    # After W&B, which may fail to start: a folder without metrics does not count as a run.
    trackers.append(JsonLines(folder / "metrics.jsonl", resume_step))
    return Trackers([*trackers, console] if console is not None else trackers)
