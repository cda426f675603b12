"""Time to dense's final loss on four hosts, of data parallelism and of local updates, on links of three kinds.

    python -m benchmarks.network.ladder_target curves [--jobs 2] [--minutes 9]       # resumable
    sudo python -m benchmarks.network.ladder_target steps [--repetitions 2]          # resumable
    sudo python -m benchmarks.network.ladder_target whole --sides "bank 25 %, every 16, int4"
    python -m benchmarks.network.ladder_target --table

The LSTM of `benchmarks.ladder`. A loss by step does not depend on the link, so time is steps times seconds per step. The steps are
those of the shortest run, of LENGTHS, whose mean final loss is not above dense's after 500 steps with the same seeds, simulated
("curves", at the settings that the ladder found best for 500 steps). A step is measured in the lab ("steps"), as a mean over whole
rounds; "floor" is a run that sends nothing after its start. "whole" compares the product with a run to the target. Four processes
share this machine's processors. Writes results/ladder_target/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ladder.__main__ import measure
from benchmarks.ladder.cells import AVERAGE, GAINS, WORKERS, Cell, cell, identity, settings_of
from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile, chosen, lines_of

Line = dict[str, Any]
TASK, SEEDS = "lstm", (0, 1)
LENGTHS = (250, 300, 350, 400, 450, 500, 600, 700, 850, 1000, 1250, 1500, 2000)
"""Steps of the runs that are tried."""
LINKS = ((100.0, 0.0), (100.0, 50.0), (10.0, 50.0))
"""Mbit/s, and milliseconds that a packet takes beside what the lab itself takes."""
WARM_UP = 10
"""Least number of steps before those that are timed; whole rounds. Twice as many are timed, for a floor ten times as many."""
MILLION = 10**6


@dataclass(frozen=True)
class Side:
    """A way to train.

    Args:
        kind: Kind of model, with its budget.
        budget: See `cell`, as all others.
        lr: Learning rate that the ladder found best.
        every: Steps in a round; 1: DDP.
        codec: Of the changes.
    """

    kind: str
    budget: float | None
    lr: float
    every: int = 1
    codec: str = "none"

    def cell(self, seed: int, steps: int) -> Cell:
        """The simulated run of a number of steps."""
        small = GAINS if self.codec == "none" else "int4"
        return cell(TASK, self.kind, self.budget, self.lr, self.every, self.codec, AVERAGE, seed, small, steps)


SIDES: dict[str, Side] = {
    "dense, DDP": Side("dense", None, 0.096),
    "bank 25 %, DDP": Side("bank", 0.25, 1.2e-2),
    "dense, every 16 (DiLoCo)": Side("dense", None, 0.096, 16),
    "dense, every 50 (DiLoCo)": Side("dense", None, 4.8e-2, 50),
    "dense, every 16, sparse (SparseLoCo)": Side("dense", None, 0.096, 16, "sparse"),
    "dense, every 16, int4": Side("dense", None, 0.096, 16, "int4"),
    "bank 25 %, every 16, int4": Side("bank", 0.25, 2.4e-2, 16, "int4"),
    "bank 25 %, every 50, int4": Side("bank", 0.25, 2.4e-2, 50, "int4"),
    "bank 25 %, every 16, sparse": Side("bank", 0.25, 2.4e-2, 16, "sparse"),
}
DENSE = "dense, DDP"
FLOORS = {"dense, floor": "dense, DDP", "bank 25 %, floor": "bank 25 %, DDP"}
"""Runs that send nothing → the side that computes the same."""


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, dict[int, float]]]:
    """Side → steps → seed → final loss, of the ladder's lines and `lines`."""
    measured = [*lines_of("ladder"), *lines_of("gains"), *(line for line in lines if "validation_loss" in line)]
    known = {identity(line): line["validation_loss"] for line in measured if "what" not in line}
    found: dict[str, dict[int, dict[int, float]]] = {}
    for name, side in SIDES.items():
        for steps, seed in itertools.product(LENGTHS, SEEDS):
            if (loss := known.get(identity(side.cell(seed, steps)))) is not None:
                found.setdefault(name, {}).setdefault(steps, {})[seed] = loss
    return found


def target(found: dict[str, dict[int, dict[int, float]]]) -> float | None:
    """Mean final loss of dense; None until it is measured."""
    losses = found.get(DENSE, {}).get(500, {})
    return statistics.mean(losses.values()) if len(losses) == len(SEEDS) else None


def steps_to(losses: dict[int, dict[int, float]], goal: float) -> int | None:
    """Steps of the shortest run whose mean loss is not above the goal."""
    whole = {steps: statistics.mean(seeds.values()) for steps, seeds in losses.items() if len(seeds) == len(SEEDS)}
    return min((steps for steps, loss in whole.items() if loss <= goal), default=None)


def to_measure(lines: Iterable[Mapping[str, Any]]) -> Iterator[Cell]:
    """Runs of 500 steps; then shorter ones while they reach the target, or longer ones until one does."""
    found = curves(lines)
    goal, middle = target(found), LENGTHS.index(500)
    for name, side in SIDES.items():
        mine = found.get(name, {})

        def reaches(steps: int, mine: dict[int, dict[int, float]] = mine) -> bool | None:
            """None: not known."""
            whole = goal is not None and len(mine.get(steps, {})) == len(SEEDS)
            return steps_to({steps: mine[steps]}, goal) is not None if whole and goal is not None else None

        first = reaches(500)
        further = LENGTHS[middle - 1 :: -1] if first else LENGTHS[middle + 1 :]
        for steps in (500, *(further if first is not None and name != DENSE else ())):
            yield from (side.cell(seed, steps) for seed in SEEDS if seed not in mine.get(steps, {}))
            if steps != 500 and reaches(steps) is not first:  # unknown yet, or on the other side of the target
                break


def settings(side: Side, seed: int, steps: int) -> list[str]:
    """Recipe of a side."""
    sync = [f"--sync.every={side.every}", f"--sync.codec={side.codec}", "--sync.outer=average"]
    return [*settings_of(side.cell(seed, steps)), *(sync if side.every > 1 else [])]


def in_lab(more: list[str], mbit: float, delay_ms: float) -> Line:
    """Summary's row of a run on four hosts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = cluster_file(folder, hosts=WORKERS, mbit=mbit, delay_ms=delay_ms)
        program = ["train", *more, "--no-progress", f"--output={folder}", "--name=run", "--engine.compare_every=null"]
        in_the_lab(cluster, folder / "logs", program)
        (row,) = json.loads((folder / "run" / "summary.json").read_text())["rows"]
    return row


def step(name: str, mbit: float, delay_ms: float) -> Line:
    """Mean milliseconds of a step over whole rounds, on the hosts.

    One more step follows, because a run's last one also asks whether there is something left to send.
    """
    side = SIDES[FLOORS.get(name, name)]
    warm = -(-WARM_UP // side.every) * side.every
    timed = 10 * warm if name in FLOORS else 2 * warm
    sizes = ["--evaluate_batches=1", f"--evaluate_every={warm}", "--schedule.warmup=1"]
    apart = [f"--sync.every={MILLION}"] if name in FLOORS else []
    row = in_lab([*settings(side, SEEDS[0], warm + timed + 1), *sizes, *apart], mbit, delay_ms)
    at = {one["step"]: one for one in row["history"]}
    took = {key: (at[warm + timed][key] - at[warm][key]) / timed for key in ("seconds", "ring_bytes")}
    figures = {"ms_per_step": 1000 * took["seconds"], "sent_bytes_per_step": took["ring_bytes"], "timed_steps": timed}
    return {"what": "step", "side": name, "mbit": mbit, "delay_ms": delay_ms, "hosts": WORKERS, **figures}


def whole(name: str, steps: int, mbit: float, delay_ms: float) -> Line:
    """A run to the target on the hosts."""
    row = in_lab(settings(SIDES[name], SEEDS[0], steps), mbit, delay_ms)
    last = row["history"][-1]
    figures = {"seconds": last["seconds"], "loss": row["validation_loss"], "ring_bytes": last["ring_bytes"]}
    return {
        "what": "whole",
        "side": name,
        "mbit": mbit,
        "delay_ms": delay_ms,
        "hosts": WORKERS,
        "steps": steps,
        **figures,
    }


def named(mbit: float, delay_ms: float) -> str:
    """A link in words."""
    return f"{mbit:g} Mbit/s" + (f", {delay_ms:g} ms" if delay_ms else "")


def seconds_to_target(name: str, link: tuple[float, float], lines: list[Line]) -> float | None:
    """Median step on a link times the steps to the target; None if either is unknown."""
    found = curves(lines)
    goal = target(found)
    steps = None if goal is None else steps_to(found.get(name, {}), goal)
    timed = [
        one["ms_per_step"] for one in lines if one.get("what") == "step" and one["side"] == name and _link(one) == link
    ]
    return statistics.median(timed) * steps / 1000 if steps and timed else None


def table(lines: list[Line]) -> Table:
    """A row per side: steps to the target, and for each link the step and the time."""
    found = curves(lines)
    goal = target(found)
    shown = Table(
        "",
        "kB sent per step",
        "steps to the target: loss (seeds)",
        *(f"{named(*link)}: ms per step; s; dense / this" for link in LINKS),
    )
    for name in (*SIDES, *FLOORS):
        timed = [one for one in lines if one.get("what") == "step" and one["side"] == name]
        if not timed:
            continue
        row = [name, f"{statistics.median(one['sent_bytes_per_step'] for one in timed) / 1000:,.2f}"]
        losses = found.get(FLOORS.get(name, name), {})
        steps = None if goal is None else steps_to(losses, goal)
        if name in FLOORS:
            row.append("")
        elif losses:
            last = steps or max(losses)
            seeds = ", ".join(f"{loss:.3f}" for loss in losses[last].values())
            row.append(
                f"{steps:,}: {statistics.mean(losses[last].values()):.3f} ({seeds})"
                if steps
                else f"not in {last:,}: {seeds}"
            )
        else:
            row.append("?")
        for link in LINKS:
            ms = [one["ms_per_step"] for one in timed if _link(one) == link]
            took, dense = seconds_to_target(name, link, lines), seconds_to_target(DENSE, link, lines)
            spread = (
                f"{statistics.median(ms):,.0f}" + (f" ({min(ms):,.0f}-{max(ms):,.0f})" if len(ms) > 1 else "")
                if ms
                else ""
            )
            row.append(spread + (f"; {took:,.0f}; {dense / took:.1f}" if took and dense else ""))
        shown.add_row(*row)
    ran = [one for one in lines if one.get("what") == "whole"]
    if ran:
        texts = (
            f"{one['side']} at {named(*_link(one))}, {one['steps']:,} steps in {one['seconds']:,.0f} s, loss {one['loss']:.3f}"
            for one in ran
        )
        shown.caption = f"Whole runs on the hosts, seed {SEEDS[0]}: {'; '.join(texts)}"
    return shown


def _link(line: Line) -> tuple[float, float]:
    return line["mbit"], line["delay_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="curves|steps|whole", help="what to measure")
    parser.add_argument("--sides", nargs="*", default=[], help="only these; all unless given")
    parser.add_argument("--links", nargs="*", type=int, default=range(len(LINKS)), help="places in LINKS")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="simulated runs at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing further after this time")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    chosen(parser, arguments.what, ["curves", "steps", "whole"])
    sides = chosen(parser, arguments.sides, [*SIDES, *FLOORS]) or [*SIDES, *FLOORS]
    results, until = ResultFile("ladder_target"), time.monotonic() + 60 * arguments.minutes
    if "curves" in arguments.what:
        measure(results, to_measure, [""], arguments.jobs, until)
    for what in ("steps", "whole"):
        for repetition in range(arguments.repetitions) if what in arguments.what else ():
            for place, name in itertools.product(arguments.links, sides):
                lines, link = results.lines(), LINKS[place]
                keys = (what.removesuffix("s"), name, link, repetition)
                done = {(one["what"], one["side"], _link(one), one["repetition"]) for one in lines if "what" in one}
                steps = steps_to(curves(lines).get(name, {}), target(curves(lines)) or 0.0)
                pointless = steps is None if what == "whole" else name in FLOORS and place  # a floor has no link
                if keys in done or pointless or time.monotonic() > until:
                    continue
                line = step(name, *link) if what == "steps" else whole(name, steps or 0, *link)
                results.add({**line, "repetition": repetition})
                print({key: value for key, value in line.items() if key != "hosts"}, flush=True)
    if arguments.table or not arguments.what:
        Console(width=200).print(table(results.lines()))


if __name__ == "__main__":
    main()
