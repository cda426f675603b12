"""Measures the ladder: how alike the workers' changes are, and loss at equal steps against bytes.

    python -m benchmarks.ladder agreement [--jobs 2]         # resumable: measured cells stay
    python -m benchmarks.ladder frontier-gpt
    python -m benchmarks.ladder table                        # what is measured so far

Workers are simulated in one process (`simulate.py`), on one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.pool import AsyncResult

from rich.console import Console
from rich.table import Table

from benchmarks.ladder.cells import identity, without
from benchmarks.ladder.simulate import run
from benchmarks.ladder.suites import SUITES, Line, Suite
from benchmarks.result_files import ResultFile, chosen

TABLE = "table"


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


def measure(results: ResultFile, suite: Suite, only: Sequence[str], jobs: int, until: float) -> None:
    """Measures the cells of a suite, `jobs` at once, each in a process of its own. Every new line may change what comes next.

    Args:
        results: Gets a line per cell.
        suite: Cells from the lines so far.
        only: Texts, of which a cell's identity has at least one.
        jobs: Number of processes.
        until: Time of `time.monotonic` after which no further cell starts.
    """
    running: dict[str, AsyncResult[Line]] = {}
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        while True:
            lines = list(results.lines())
            named = {identity(one): one for one in without(suite(lines), lines)}
            wanted = [one for name, one in named.items() if name not in running and any(text in name for text in only)]
            if time.monotonic() < until:
                running |= {identity(one): pool.apply_async(run, (one,)) for one in wanted[: jobs - len(running)]}
            if not running:
                return
            while not (ready := [name for name, result in running.items() if result.ready()]):
                time.sleep(0.5)
            for name in ready:
                line = running.pop(name).get()
                results.add({**line, "commit": results.provenance["commit"]})
                print(f"  {line['validation_loss']:.4f}  {line['seconds']:.0f} s  {name}", flush=True)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="cells whose identity has one of these")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cells after this time")
    return parser


def one_suite(name: str, suite: Suite, description: str | None) -> None:
    """The command line of a suite whose lines have a folder of their own, results/<name>/."""
    arguments = _parser(description).parse_args()
    measure(ResultFile(name), suite, arguments.only, arguments.jobs, time.monotonic() + 60 * arguments.minutes)


def main() -> None:
    parser = _parser(__doc__)
    parser.add_argument("suites", nargs="*", help=f"what to measure: {', '.join(SUITES)}; or {TABLE}")
    arguments = parser.parse_args()
    results, began = ResultFile("ladder"), time.monotonic()
    for suite in chosen(parser, arguments.suites, [*SUITES, TABLE]):
        if suite in SUITES:
            measure(results, SUITES[suite], arguments.only, arguments.jobs, began + 60 * arguments.minutes)
    if TABLE in arguments.suites or not arguments.suites:
        Console(width=160).print(table(results))


if __name__ == "__main__":
    main()
