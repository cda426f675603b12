"""How few bytes lead to dense's final loss, when more steps are allowed? Longer runs of the rungs that send least.

    python -m benchmarks.ladder.longer [--only TEXT] [--jobs 2] [--minutes 9]     # resumable: measured cells stay

Settings are those that the ladder found best for the task's own steps; each length has its own schedule. The LSTM's rungs that
`benchmarks.network.ladder_target` has are not measured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.ladder.__main__ import one_suite
from benchmarks.ladder.cells import AVERAGE, TASKS, Cell, cell, without
from benchmarks.ladder.suites import LONG, NESTEROV, SHORT, Line
from benchmarks.result_files import lines_of

BANK, SMALL, DENSE = ("bank", 0.25), ("small", 0.25), ("dense", None)
Setting = tuple[tuple[str, float | None], float, int, str, tuple[float, float], tuple[int, ...]]
"""Kind and budget, learning rate, period, codec, outer setting, and the lengths to try, as multiples of the task's steps."""
SETTINGS: dict[str, list[Setting]] = {
    "lstm": [
        (BANK, 2.4e-2, LONG, "int4", AVERAGE, (2,)),
        (BANK, 2.4e-2, SHORT, "sparse", AVERAGE, (2, 4)),
        (SMALL, 0.192, LONG, "int4", AVERAGE, (2, 4)),
        (SMALL, 0.192, SHORT, "sparse", AVERAGE, (2, 4)),
    ],
    "wrn": [
        (BANK, 0.2, SHORT, "int4", NESTEROV, (2, 4)),
        (DENSE, 0.4, SHORT, "int4", NESTEROV, (2, 4)),
        (SMALL, 0.2, SHORT, "int4", AVERAGE, (2, 4)),
        (BANK, 0.1, LONG, "int4", NESTEROV, (2, 4, 8)),
        (DENSE, 0.2, LONG, "int4", NESTEROV, (2, 4, 8)),
        (SMALL, 0.2, LONG, "int4", AVERAGE, (2, 4, 8)),
        (BANK, 0.2, SHORT, "sparse", AVERAGE, (2, 4)),
        (DENSE, 0.4, SHORT, "sparse", NESTEROV, (2, 4)),
        (SMALL, 0.2, SHORT, "sparse", AVERAGE, (2, 4)),
    ],
    "gpt": [
        (BANK, 6e-3, SHORT, "int4", NESTEROV, (2, 4)),
        (BANK, 6e-3, SHORT, "sparse", NESTEROV, (4,)),
        (BANK, 6e-3, 2 * SHORT, "sparse", NESTEROV, (4, 5)),
        (DENSE, 6e-3, SHORT, "int4", NESTEROV, (2,)),
        (DENSE, 6e-3, 2 * SHORT, "sparse", NESTEROV, (4,)),
        (DENSE, 6e-3, 4 * SHORT, "sparse", NESTEROV, (4,)),
        (SMALL, 6e-3, SHORT, "int4", NESTEROV, (4,)),
        (SMALL, 6e-3, SHORT, "sparse", NESTEROV, (4,)),
    ],
}
SEEDS = {"lstm": 2, "wrn": 2, "gpt": 1}
"""Number of seeds that are wanted."""


def known() -> list[dict[str, Any]]:
    """All runs with a period whose gains are in 4 bits, or which have no codec; those of the ladder itself have 16 bits."""
    lines = [
        line for name in ("gains", "ladder_target", "longer") for line in lines_of(name) if "validation_loss" in line
    ]
    return [line for line in lines if line["every"] > 1 and (line["codec"] == "none" or line["small"] == "int4")]


def cells(_: Iterable[Line] = ()) -> Iterator[Cell]:
    """The cells of SETTINGS that have no line yet, the first seed of all tasks first; gains are in 4 bits."""
    yield from without(_wanted(), known())


def _wanted() -> Iterator[Cell]:
    for seed in range(max(SEEDS.values())):
        for task in (task for task, seeds in SEEDS.items() if seed < seeds):
            for model, lr, every, codec, outer, lengths in SETTINGS[task]:
                for length in lengths:
                    yield cell(task, *model, lr, every, codec, outer, seed, "int4", length * TASKS[task]["steps"])


if __name__ == "__main__":
    one_suite("longer", cells, __doc__)
