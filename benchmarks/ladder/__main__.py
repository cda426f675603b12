"""Measures the ladder: how alike the workers' changes are, and loss at equal steps against bytes.

    python -m benchmarks.ladder agreement [--jobs 2]         # resumable: measured cells stay
    python -m benchmarks.ladder frontier-gpt
    python -m benchmarks.ladder table                        # what is measured so far

Workers are simulated in one process (`simulate.py`), on one thread.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from benchmarks.ladder.cells import identity, without
from benchmarks.ladder.simulate import run
from benchmarks.ladder.suites import SUITES
from benchmarks.result_files import ResultFile, chosen


def table(results: ResultFile) -> Table:
    """One row per cell, by bytes."""
    made = Table("task", "model", "every", "codec", "outer", "lr", "seed", "parameters", "MB", "loss")
    for line in sorted(results.lines(), key=lambda line: (line["task"], line["bytes"])):
        model = line["kind"] if line["budget"] is None else f"{line['kind']} {line['budget']:.0%}"
        settings = (
            str(line["every"]),
            line["codec"],
            "/".join(map(str, line["outer"])),
            f"{line['lr']:g}",
            str(line["seed"]),
        )
        figures = (f"{line['parameters']:,}", f"{line['bytes'] / 1e6:.3f}", f"{line['validation_loss']:.4f}")
        made.add_row(line["task"], model, *settings, *figures)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"what to measure: {', '.join(SUITES)}; or table")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cells after this time")
    arguments = parser.parse_args()
    results, began = ResultFile("ladder"), time.monotonic()
    for suite in chosen(parser, arguments.suites, [*SUITES, "table"]):
        while suite != "table" and time.monotonic() - began < 60 * arguments.minutes:
            lines = results.lines()
            if not (wanted := without(SUITES[suite](lines), lines)[: arguments.jobs]):
                break
            for line in results.measure(run, wanted, arguments.jobs, commit=results.provenance["commit"]):
                print(f"  {line['validation_loss']:.4f}  {line['seconds']:.0f} s  {identity(line)}", flush=True)
    if "table" in arguments.suites or not arguments.suites:
        Console(width=160).print(table(results))


if __name__ == "__main__":
    main()
