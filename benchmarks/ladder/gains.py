"""In which codec can gains, coefficients, biases and norms travel? Loss of a 25 % bank with each, at equal steps.

    python -m benchmarks.ladder.gains [--only TEXT] [--jobs 2] [--minutes 9]     # resumable: measured cells stay

In 16 bits they are 39 % of a 25 % bank's message in 4 bits, and 92 % of its sparse one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.ladder.__main__ import one_suite
from benchmarks.ladder.cells import AVERAGE, Cell, cell
from benchmarks.ladder.suites import NESTEROV, SHORT, Line

SMALL = {"int4": ("bf16", "int8", "int4"), "sparse": ("bf16", "int8", "int4", "sparse")}
"""Codec → codecs of gains that are tried with it."""
SETTINGS = {"gpt": (6e-3, NESTEROV), "lstm": (2.4e-2, AVERAGE)}
"""Task → learning rate and outer setting of the 25 % bank every 16 steps."""
ALWAYS = {("bank", 0.25): 1.2e-2, ("dense", None): 0.096}
"""LSTM → learning rate with gradients in 4 bits on every step."""


def cells(_: Iterable[Line] = ()) -> Iterator[Cell]:
    """All of the LSTM's with two seeds; the GPT's with one, and those of 4 bits with two."""
    for seed in (0, 1):
        for task, (lr, outer) in SETTINGS.items():
            for codec, tried in SMALL.items():
                for small in tried:
                    if task == "lstm" or not seed or small == "int4":
                        yield cell(task, "bank", 0.25, lr, SHORT, codec, outer, seed, small)
        for (kind, budget), lr in ALWAYS.items():
            for small in ("bf16", "int4"):
                yield cell("lstm", kind, budget, lr, 1, "int4", seed=seed, small=small)


if __name__ == "__main__":
    one_suite("gains", cells, __doc__)
