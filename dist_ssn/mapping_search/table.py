"""The table of trials, which grows while a search runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dist_ssn.mapping_search.trials import Line


class Progress:
    """Shows trials as they end: on a terminal in place, elsewhere as one table at the end.

    Args:
        console: prints the table.
        shown: False: nothing is printed.
    """

    def __init__(self, console: Console, shown: bool = True):
        self.lines: list[Line] = []
        self.note: str | None = None
        self._console, self._shown = console, shown
        self._live: Live | None = None

    def report(self, line: Line) -> None:
        """Adds a line of a search, or the note at its end; only rank 0 calls it."""
        if line["kind"] == "found":
            self.note = line["note"]
            return
        self.lines.append(line)
        if not (self._shown and self._console.is_terminal):
            return
        if self._live is None:  # methods without trials have no table
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(trial_table(self.lines), refresh=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self.lines and self._shown:
            self._console.print(trial_table(self.lines))


def trial_table(lines: list[Line]) -> Table:
    """A table with one line per trial, in their order; the best of each rung is marked."""
    table = Table("rung", "mapping", "morph", "banks", "steps", "validation loss", "seconds", title="search")
    losses: dict[int, list[float]] = {}
    for line in lines:
        if line["kind"] == "trial" and line["loss"] is not None:
            losses.setdefault(line["rung"], []).append(line["loss"])
    for line in lines:
        if line["kind"] == "left out":
            table.add_row("–", line["mapping"], line["morph"], "–", "–", f"left out: {line['reason']}", "–")
            continue
        loss = line["loss"]
        mark = " ←" if loss is not None and loss == min(losses[line["rung"]]) else ""
        shown = "diverged" if loss is None else f"{loss:.4f}{mark}"
        table.add_row(
            *(str(line["rung"] + 1), line["mapping"], line["morph"], str(line["banks"]), str(line["steps"])),
            *(shown, f"{line['seconds']:.1f}"),
        )
    return table
