"""Markdown tables, and the formats of the figures in them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from rich.table import Table


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def from_rich(table: Table) -> str:
    """A terminal table as Markdown, with its caption below."""
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    made = grid([str(column.header) for column in table.columns], rows)
    return f"{made}\n\n{table.caption}." if table.caption else made


def middle(values: Sequence[float], shown: str = ".0f") -> str:
    """Text "median (min-max)"."""
    return f"{statistics.median(values):{shown}} ({min(values):{shown}}-{max(values):{shown}})"


def mean(values: Sequence[float], shown: str = ".3f", unit: str = "") -> str:
    """Text "mean (each value)"; for more than three values "mean ± standard deviation"."""
    middle = f"{statistics.mean(values):{shown}}"
    if len(values) == 1:
        return f"{middle}{unit} (one seed)"
    if len(values) > 3:
        return f"{middle} ± {statistics.stdev(values):{shown}}{unit}"
    return f"{middle}{unit} ({each(values, shown)})"


def difference(values: Sequence[float], shown: str = "+.3f") -> str:
    """Text "mean ± standard error" of differences seed by seed."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:{shown.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{shown}}{error}"


def each(values: Iterable[float], shown: str = ".3f") -> str:
    return ", ".join(f"{value:{shown}}" for value in values)


def bold_least(values: Sequence[float], shown: Callable[[float], str]) -> list[str]:
    """Texts of the values, the first of the least in bold."""
    least = min(range(len(values)), key=lambda index: values[index])
    return [f"**{shown(value)}**" if index == least else shown(value) for index, value in enumerate(values)]


def short(rate: float) -> str:
    """Text of a learning rate, such as 1.2e-2 or 0.2."""
    digits, _, power = f"{rate:.1e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if rate < 0.05 else f"{rate:g}"
