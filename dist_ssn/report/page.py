"""A report as one static page and as Markdown: tables that need no colours, and pictures with a descriptive text.

The page loads nothing and runs no script. Names come from files of unknown origin, so all text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from dist_ssn.report.table import Column, human_bytes, is_number

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #767676; --soft: #f2f2f2; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #161616; --line: #9a9a9a; --soft: #262626; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 6rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; }
pre { overflow-x: auto; padding: .7rem; background: var(--soft); }
"""


@dataclass(frozen=True)
class Grid:
    """A table: a caption, headings, and a row of texts for each line; the first cell names the line."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def terminal(self) -> Table:
        """The table for the terminal."""
        table = Table(*map(escape, self.headings), title=escape(self.caption))
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page, with a caption of one line and a text that describes the image."""

    file: str
    caption: str
    alternative: str


@dataclass(frozen=True)
class Page:
    """The parts of a report, in this order."""

    title: str
    lead: str
    parts: Sequence[Grid | Picture]

    def html(self) -> str:
        """The page as HTML; pictures lie in its own folder."""
        body = "\n".join(_grid_html(part) if isinstance(part, Grid) else _picture_html(part) for part in self.parts)
        title, lead = html.escape(self.title), html.escape(self.lead)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<main>\n<h1>{title}</h1>\n<p>{lead}</p>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def markdown(self) -> str:
        """The page as Markdown."""
        parts = [_grid_markdown(part) if isinstance(part, Grid) else _picture_markdown(part) for part in self.parts]
        return "\n\n".join([f"# {_plain(self.title)}", _plain(self.lead), *parts]) + "\n"


def _grid_html(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in grid.headings)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{html.escape(text)}</td>" for text in row[1:])}</tr>'
        for row in grid.rows
    )
    # The box can be scrolled by keyboard too.
    name = html.escape(grid.caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}">\n<table>\n<caption>{name}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _picture_html(picture: Picture) -> str:
    file, text = html.escape(picture.file), html.escape(picture.alternative)
    return (
        f'<figure>\n<img src="{file}" alt="{text}">\n<figcaption>{html.escape(picture.caption)}</figcaption>\n</figure>'
    )


def _grid_markdown(grid: Grid) -> str:
    lines = [grid.headings, ["---", *("---:" for _ in grid.headings[1:])], *grid.rows]
    table = "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)
    return f"**{_plain(grid.caption)}**\n\n{table}"


def _picture_markdown(picture: Picture) -> str:
    return f"![{_plain(picture.alternative)}]({picture.file})\n\n{_plain(picture.caption)}"


def _plain(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    for character in "\\`*[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def runs_grid(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Grid:
    """The table that compares runs."""
    headings = ["run", *(column.name for column in columns)]
    return Grid(
        "Runs; bytes are those that one rank sends",
        headings,
        [[str(row["name"]), *(column.cell(row) for column in columns)] for row in rows],
    )


def ledger_grid(ledgers: Mapping[str, Mapping[str, float]]) -> Grid | None:
    """Bytes by purpose, a column per run; None if no run has sent anything."""
    purposes = sorted({purpose for ledger in ledgers.values() for purpose, count in ledger.items() if count})
    if not purposes:
        return None
    rows = [[purpose, *(human_bytes(ledger.get(purpose, 0)) for ledger in ledgers.values())] for purpose in purposes]
    return Grid("Bytes sent, by purpose (ring bytes of one rank)", ["purpose", *ledgers], rows)


def prediction_grid(rows: Sequence[Mapping[str, Any]]) -> Grid | None:
    """Predictions for runs beside their measurements; None if no run has a prediction."""
    lines = []
    for row in rows:
        for line in row.get("prediction", ()):
            if isinstance(line, dict) and all(is_number(line.get(key)) for key in ("predicted", "measured", "off")):
                shown = (f"{line['predicted']:,.1f}", f"{line['measured']:,.1f}", f"{line['off']:+.1%}")
                lines.append([str(row["name"]), str(line.get("figure")), *shown])
    return Grid("Predicted and measured", ["run", "figure", "predicted", "measured", "off"], lines) if lines else None
