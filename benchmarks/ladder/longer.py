"""How few bytes lead to dense's final loss, when more steps are allowed? Longer runs of the rungs that send least.

    python -m benchmarks.ladder.longer [--only TEXT] [--jobs 2] [--minutes 9]     # resumable: measured cells stay

Settings are those that the ladder found best for the task's own steps; each length has its own schedule. The LSTM's rungs that
`benchmarks.network.ladder_target` has are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator

from benchmarks.ladder.__main__ import measure
from benchmarks.ladder.cells import AVERAGE, TASKS, Cell, cell, without
from benchmarks.ladder.suites import LONG, NESTEROV, SHORT, Line
from benchmarks.result_files import ResultFile, lines_of

BANK, SMALL, DENSE = ("bank", 0.25), ("small", 0.25), ("dense", None)
Setting = tuple[tuple[str, float | None], float, int, tuple[float, float], tuple[int, ...]]
"""Kind and budget, learning rate, period, outer setting, and the lengths that are tried, as multiples of the task's steps."""
SETTINGS: dict[str, list[Setting]] = {
    "lstm": [
        (BANK, 2.4e-2, LONG, AVERAGE, (2,)),
        (SMALL, 0.192, LONG, AVERAGE, (2, 4)),
        (SMALL, 0.192, SHORT, AVERAGE, (2, 4)),
    ],
    "wrn": [
        (BANK, 0.2, SHORT, NESTEROV, (2, 4)),
        (DENSE, 0.4, SHORT, NESTEROV, (2, 4)),
        (SMALL, 0.2, SHORT, AVERAGE, (2, 4)),
        (BANK, 0.1, LONG, NESTEROV, (2, 4, 8)),
        (DENSE, 0.2, LONG, NESTEROV, (2, 4, 8)),
        (SMALL, 0.2, LONG, AVERAGE, (2, 4, 8)),
    ],
    "gpt": [
        (BANK, 6e-3, SHORT, NESTEROV, (2, 4)),
        (BANK, 6e-3, LONG, NESTEROV, (4,)),
        (DENSE, 6e-3, SHORT, NESTEROV, (2,)),
        (SMALL, 6e-3, SHORT, NESTEROV, (4,)),
    ],
}
SEEDS = {"lstm": (0, 1), "wrn": (0, 1), "gpt": (0,)}


def known() -> list[Line]:
    """All runs of more steps than the task's own that are measured."""
    lines = [*lines_of("ladder_target"), *lines_of("longer")]
    return [line for line in lines if "validation_loss" in line and line["steps"] > TASKS[line["task"]]["steps"]]


def cells(lines: Iterable[Line] = ()) -> Iterator[Cell]:
    """What is not measured yet, all in 4 bits."""
    yield from without(_wanted(), [*known(), *lines])


def _wanted() -> Iterator[Cell]:
    for task, settings in SETTINGS.items():
        for seed in SEEDS[task]:
            for model, lr, every, outer, lengths in settings:
                for steps in (length * TASKS[task]["steps"] for length in lengths):
                    yield cell(task, *model, lr, every, "int4", outer, seed, "int4", steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="cells whose identity has one of these")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cells after this time")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    measure(ResultFile("longer"), cells, arguments.only, arguments.jobs, until)


if __name__ == "__main__":
    main()
