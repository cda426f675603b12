"""Time that a network's delay adds to a step, by overlap setting; measured, and as `dist-ssn plan` predicts it.

    sudo python -m benchmarks.network.latency [--delay-ms 0 10 50] [--repetitions 3]
    python -m benchmarks.network.latency --table

Two emulated hosts, one per core, on links of 100 Mbit/s that delay every packet. Resumable; writes results/latency/.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network import overlap
from benchmarks.network.in_the_lab import cluster_file
from benchmarks.network.prediction import calibrate, measure, predict
from benchmarks.result_files import ResultFile

Line = dict[str, Any]
HOSTS, MBIT, MODEL, BUDGET = 2, 100.0, "gpt-128", 0.1
SIDES = {"dense": "dense", "one bank": "none", "segments:4": "segments:4", "depth:4": "depth:4"}
"""side → its name in `cost.alternatives` and in `overlap.SIDES`"""
KEYS = ("side", "delay_ms", "repetition")


def measured(delay_ms: float, sides: Iterable[str]) -> Iterable[Line]:
    """Measures these sides on such links, each beside its prediction."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compute = calibrate(HOSTS, MODEL, BUDGET, folder)
        cluster = cluster_file(folder, hosts=HOSTS, mbit=MBIT, delay_ms=delay_ms)
        predicted = predict(cluster, MODEL, BUDGET, compute)
        for side in sides:
            setting = SIDES[side]
            recipe = overlap.SIDES[setting][1:]  # what comes first is the budget
            ms = measure(cluster, "ddp", MODEL, None if side == "dense" else BUDGET, folder, recipe)["ms_per_step"]
            said = {"predicted_ms_per_step": predicted[setting]["ms_per_step"], "rounds": predicted[setting]["rounds"]}
            yield {"side": side, "delay_ms": delay_ms, "ms_per_step": ms, **said}


def table(lines: Iterable[Line]) -> Table:
    """A table of medians by side and delay, beside the newest predictions (`lines` are oldest first)."""
    lines = list(lines)
    delays = sorted({line["delay_ms"] for line in lines})
    shown = Table("side", "messages per step", *(f"{delay:g} ms: ms per step; predicted" for delay in delays))
    for side in SIDES:
        cells = []
        for delay in delays:
            mine = [line for line in lines if (line["side"], line["delay_ms"]) == (side, delay)]
            ms, said = ([line[key] for line in mine] for key in ("ms_per_step", "predicted_ms_per_step"))
            middle = f"{statistics.median(ms):.0f} ({min(ms):.0f}-{max(ms):.0f})" if mine else ""
            cells.append(f"{middle}; {said[-1]:.0f}" if mine else "")
        rounds = {line["rounds"] for line in lines if line["side"] == side}
        shown.add_row(side, ", ".join(map(str, sorted(rounds))), *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", nargs="+", type=float, default=[0, 10, 50])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("latency")
    done = {tuple(line[key] for key in KEYS) for line in results.lines()}
    for repetition in () if arguments.table else range(arguments.repetitions):
        for delay in arguments.delay_ms:
            missing = [side for side in SIDES if (side, delay, repetition) not in done]
            for line in measured(delay, missing) if missing else ():
                results.add({**line, "repetition": repetition})
                shown = f"{line['ms_per_step']:.0f} ms, predicted {line['predicted_ms_per_step']:.0f}"
                print(f"{line['side']}, {delay:g} ms of delay: {shown}", flush=True)
    Console(width=140).print(table(results.lines()))


if __name__ == "__main__":
    main()
