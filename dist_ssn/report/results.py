"""Measurements of benchmarks (JSON lines), as tables for a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_ssn.errors import UserError
from dist_ssn.files import parse_json, read_text
from dist_ssn.report.page import Grid

MOST = 64 << 20
"""Bytes of the largest file that is read."""


def result_files(path: Path) -> list[Path]:
    """Result files at `path`: the file itself, or those in the folder; none in a run's folder, whose metrics are JSON lines too."""
    if path.suffix == ".jsonl":
        return [path]
    return [] if (path / "metrics.jsonl").exists() else sorted(path.glob("*.jsonl"))


def results_grid(path: Path) -> Grid:
    """A table of all measurements: values that differ are columns, values that do not are in the caption, lists are left out.

    Raises:
        UserError: a file is too large, or has a line that is not a measurement.
    """
    lines = [line for file in result_files(path) for line in _lines(file)]
    if not lines:
        raise UserError(f"there are no measurements in {path}: expected lines of JSON, as benchmarks write them")
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if not _nested(lines, key)]
    shown = [key for key in keys if len({json.dumps(line.get(key)) for line in lines}) > 1]
    same = ", ".join(f"{key}: {_text(lines[0].get(key))}" for key in keys if key not in shown)
    rows = [[_text(line.get(key)) for key in shown] for line in lines]
    return Grid(f"{path}: {len(lines)} measurements ({same})", shown or ["measurement"], rows if shown else [["1"]])


def _nested(lines: list[dict[str, Any]], key: str) -> bool:
    return any(isinstance(line.get(key), list | dict) for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    try:
        if (size := file.stat().st_size) > MOST:
            raise UserError(f"{file} has {size} bytes, and at most {MOST} are read")
        texts = read_text(file, MOST).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{file}, line {number} is not a measurement: expected a JSON object, got {text!r:.60}")
        found.append(line)
    return found
