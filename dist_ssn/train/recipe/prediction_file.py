"""The file that `predicted` of a recipe names: what `dist-ssn plan --cluster … --json` said of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_ssn.files import read_json

FIGURES = ("bytes_per_step_logical", "exposed_ms_per_step", "ms_per_step")


def alternative_of(share_budget: Any, share_mapping: str | dict[str, str], overlap: str) -> str:
    """Name of a run's settings among the alternatives that `dist-ssn plan --cluster` compares."""
    if share_budget is None:
        return "dense"
    by_depth = isinstance(share_mapping, str) and share_mapping.startswith("depth:")
    return str(share_mapping) if by_depth and overlap == "none" else overlap


def read_prediction(path: Path, name: str) -> dict[str, float]:
    """The predicted figures of one alternative, FIGURES.

    Args:
        path: JSON, as `dist-ssn plan --cluster … --json` prints it.
        name: of the alternative.

    Raises:
        ValueError: the file has another form, or lacks this alternative.
        OSError: it cannot be read.
    """
    content = read_json(path)
    rows = content.get("ways") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "way" in row for row in rows):
        raise ValueError('it has no list of "ways"')
    row = next((row for row in rows if row["way"] == name), None)
    if row is None:
        raise ValueError(f"it says nothing of {name!r}, only of {', '.join(str(row['way']) for row in rows)}")
    for key in FIGURES:
        if not isinstance(row.get(key), int | float):
            raise ValueError(f"its {key} of {name!r} is {row.get(key)!r}, not a number")
    return {key: row[key] for key in FIGURES}
