"""The table that compares runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich import box
from rich.markup import escape
from rich.table import Table

_LARGEST = 1e300


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float that can be drawn; JSON's true, NaN and integers of hundreds of digits are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def describe_value(value: Any) -> str:
    """A value of a file for a sentence: lists and objects by their kind, others by their first characters."""
    return {list: "a list", dict: "an object", type(None): "null"}.get(type(value), f"{value!r:.60}")


def human_number(count: float) -> str:
    """A count with three digits and a decimal prefix: 1,262,000 is "1.26 M"."""
    value, prefixes = float(count), ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}".rstrip()


def human_bytes(count: float) -> str:
    """A number of bytes with three digits and a decimal unit: 1,262,000 is "1.26 MB"."""
    number = human_number(count)
    return f"{number}B" if number[-1].isalpha() else f"{number} B"


def _less_sent(rows: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    most = max((row["total_bytes"] for row in rows), default=0)
    return lambda row: f"{most / row['total_bytes']:.1f}×" if row["total_bytes"] else "–"


@dataclass(frozen=True)
class Column:
    """A column of the table that compares runs.

    Args:
        name: its heading.
        short: its heading on a narrow terminal.
        cell: row → text.
    """

    name: str
    short: str
    cell: Callable[[Mapping[str, Any]], str]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns for these rows; those for accuracy, and for the workers' agreement and waiting, only if a row has them."""
    columns = [
        Column("trainable parameters", "para-\nmeters", lambda row: human_number(row["parameters"])),
        Column("optimizer state", "optim.\nstate", lambda row: human_bytes(row["optimizer_bytes"])),
        Column("logical per step", "a step\nlogical", lambda row: human_bytes(row["bytes_per_step_logical"])),
        Column("ring per step", "a step\nring", lambda row: human_bytes(row["bytes_per_step_ring"])),
        Column("ring in all", "in all\nring", lambda row: human_bytes(row["total_bytes"])),
        Column("less sent", "less\nsent", _less_sent(rows)),
        Column("ms per step", "ms a\nstep", lambda row: f"{row['ms_per_step']:.3g}"),
        Column("validation loss", "valid.\nloss", lambda row: _number(row["validation_loss"], ".4f")),
    ]
    if any("validation_accuracy" in row for row in rows):
        accuracy = Column("accuracy", "valid.\naccuracy", lambda row: _number(row.get("validation_accuracy"), ".2%"))
        columns.append(accuracy)
    if any("agreement" in row for row in rows):  # local updates
        columns.append(Column("agreement", "agree-\nment", lambda row: _number(row.get("agreement"), ".2f")))
    if any("waiting" in row for row in rows):
        columns.append(Column("waiting", "wait-\ning", lambda row: _number(row.get("waiting"), ".0%")))
    return columns


def summary_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Table with a line per run: parameters, optimizer state, bytes sent per rank, time of a step, validation loss.

    Args:
        rows: dicts like `RunResult.row`; what only some runs have has a column if a row has it.
        title: of the table.
    """
    # Eighty columns are enough for three runs side by side: no vertical lines, short headings, names that wrap.
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        caption="bytes that one rank sends",
    )
    table.add_column("run", vertical="bottom")
    columns = columns_of(rows)
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(escape(str(row["name"])), *(column.cell(row) for column in columns))
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
