"""Time to dense's final loss on four hosts, by bandwidth.

    sudo python -m benchmarks.network.time_to_target curves steps [--mbit 100 1000 10000] [--delay-ms 0 10] [--repetitions 5]
    sudo python -m benchmarks.network.time_to_target whole --sides "5%, fp16" --mbit 100
    python -m benchmarks.network.time_to_target --table

A synchronous method's loss by step does not depend on the network. So time is steps times seconds per step. The steps are those
of the shortest run whose mean final loss is not above dense's with the same seeds (`benchmarks.quality.run target target-confirm`;
runs that send anything but gradients in fp32 are made here, by "curves": 16 bits on two processes, other methods on four,
over learning rates of their own). A step is measured in the lab ("steps"), all sides in turn. "whole" compares the product
with a run to the target. Four ranks share this machine's processors, which is hard on the sides that send little. Writes
results/time_to_target/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network.in_the_lab import cluster_file, in_the_lab, quietly
from benchmarks.network.target_runs import SMALL, Runs, all_runs, best_rate, losses_of, steps_to
from benchmarks.quality.cells import SEEDS
from benchmarks.quality.further_suites import TARGETS
from benchmarks.quality.tasks import EQUAL, TASKS
from benchmarks.result_files import ResultFile, chosen, lines_of

Line = dict[str, Any]
TASK, HOSTS = "gpt-wide", 4
WARM_UP, STEPS = 10, 30
TWINS = {"dense, fp16": "dense", "10%, fp16": "10%", "5%, fp16": "5%"}
"""Sides whose gradients travel as 16 bits → the side in fp32 whose steps and best learning rate they take."""
ENGINES = {
    **{f"dense, ZeRO-{n}": ["--engine.name=deepspeed", f"--engine.stage={n}"] for n in (1, 2, 3)},
    "dense, FSDP2": ["--engine.name=fsdp"],
}
"""Sides with dense's losses, because they compute the same to rounding → settings of their recipes."""
Grid = tuple[tuple[int, ...], tuple[float, ...]]
_ADAM = (3.75e-4, 7.5e-4, 1.5e-3)
METHODS: dict[str, tuple[str, Grid]] = {
    **{f"dense, PowerSGD rank {rank}": (f"powersgd:{rank}", ((1500,), _ADAM)) for rank in (1, 2)},
    "dense, PowerSGD rank 4": ("powersgd:4", ((1500, 2000), _ADAM)),
    "dense, local SGD, H = 4": ("local:4", ((1500,), (*_ADAM, 3e-3))),
    "dense, local SGD, H = 16": ("local:16", ((1500, 2000, 3000), _ADAM)),
    "dense, DiLoCo, H = 50": ("diloco:50", ((1500, 3000), _ADAM)),
    "dense, DiLoCo, H = 100": ("diloco:100", ((1500,), _ADAM)),
    "dense, DeMo, k = 32": ("demo:32", ((1500,), (2.5e-4, 5e-4, 1e-3))),
}
"""side → a method of `benchmarks.network.methods`, and steps and learning rates of its runs."""
APART = ["--engine.compare_every=null"]
"""Methods whose processes may hold different models."""
SIGNS = ["--optimizer.name=sgd", "--optimizer.momentum=0"]
"""Settings for DeMo, which makes the update itself."""


def sides() -> dict[str, list[str]]:
    """Name of a side → settings of its recipe, for every budget of `TARGETS`."""
    fp16 = ["--engine.compress=fp16"]
    budgets = {f"{side:.0%}": [f"--share.budget={side}"] for side in TARGETS[TASK] if isinstance(side, float)}
    return {
        "dense": [],
        "dense, fp16": fp16,
        **ENGINES,
        **{side: [*APART, *(SIGNS if "demo" in method else [])] for side, (method, _) in METHODS.items()},
        SMALL: [f"--model_args={json.dumps(EQUAL[0.1][TASK])}"],
        **budgets,
        **{f"{budget:.0%}, fp16": [f"--share.budget={budget}", *fp16] for budget in (0.1, 0.05)},
    }


def program(side: str, steps: int, folder: str, more: Iterable[str]) -> list[str]:
    """Command line of a training run, for a launcher."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in TASKS[TASK].items()}
    texts |= {"name": "run", "steps": str(steps), "output": folder, "threads": "1"}
    return ["train", "--no-progress", *(f"--{key}={value}" for key, value in texts.items()), *sides()[side], *more]


def script(side: str) -> list[str]:
    return [str(Path(__file__).with_name("methods.py")), METHODS[side][0]] if side in METHODS else []


def period(side: str) -> int:
    """Number of steps after which a side's pattern of communication repeats."""
    name, _, number = METHODS[side][0].partition(":") if side in METHODS else ("", "", "1")
    return int(number) if name in ("local", "diloco") else 1


def curve(side: str, steps: int, rate: float, seed: int) -> Line:
    """Trains a whole run on this machine; a method with as many processes as in the lab, since its losses depend on that."""
    processes = HOSTS if side in METHODS else 2
    with tempfile.TemporaryDirectory() as folder:
        more = [f"--optimizer.lr={rate}", f"--seed={seed}", *([f"--share.seed={seed}"] if "%" in side else [])]
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={processes}",
        ]
        started = script(side) or ["-m", "dist_ssn.cli"]
        quietly([*launch, *started, *program(side, steps, folder, more)], OMP_NUM_THREADS="1")
        row = json.loads((Path(folder) / "run" / "summary.json").read_text())["rows"][0]
    cell = {"what": "curve", "task": TASK, "side": side, "seed": seed, "steps": steps, "rate": rate}
    return {**cell, "validation_loss": row["validation_loss"]}


def in_lab(side: str, steps: int, mbit: float, delay_ms: float, more: Iterable[str]) -> Line:
    """Summary of a run on four emulated hosts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = cluster_file(folder, mbit=mbit, delay_ms=delay_ms)
        in_the_lab(cluster, folder / "logs", [*script(side), *program(side, steps, name, more)])
        (row,) = json.loads((folder / "run" / "summary.json").read_text())["rows"]
    return row


def step(side: str, mbit: float, delay_ms: float) -> Line:
    """Milliseconds per step: the median, or the mean over whole periods of a method."""
    steps = math.ceil(STEPS / period(side)) * period(side)
    more = [f"--evaluate_every={WARM_UP}", "--evaluate_batches=1", "--schedule.warmup=1"]
    row = in_lab(side, WARM_UP + steps, mbit, delay_ms, more)
    cell = {"what": "step", "task": TASK, "side": side, "mbit": mbit, "delay_ms": delay_ms, "hosts": HOSTS}
    cell |= {key: row[key] for key in ("ms_per_step", "bytes_per_step_ring", "parameters")}
    if side in METHODS:
        before, after = (next(at for at in row["history"] if at["step"] == end) for end in (WARM_UP, WARM_UP + steps))
        mean = {key: (after[key] - before[key]) / steps for key in ("seconds", "ring_bytes")}
        cell |= {"ms_per_step": 1000 * mean["seconds"], "bytes_per_step_ring": round(mean["ring_bytes"])}
    return cell


def whole(side: str, steps: int, rate: float, mbit: float, delay_ms: float) -> Line:
    """Runs to the target, for a comparison with steps times time per step."""
    row = in_lab(side, steps, mbit, delay_ms, [f"--optimizer.lr={rate}", f"--seed={SEEDS[0]}"])
    cell = {"what": "whole", "task": TASK, "side": side, "mbit": mbit, "delay_ms": delay_ms, "hosts": HOSTS}
    seconds = row["history"][-1]["seconds"]  # of steps alone
    return {**cell, "steps": steps, "rate": rate, "seconds": seconds, "validation_loss": row["validation_loss"]}


def target(runs: dict[str, Runs]) -> dict[int, float]:
    """Final loss of the dense model by seed."""
    return losses_of(runs["dense"])[TASKS[TASK]["steps"]]


def curves_of(side: str, seed: int, runs: dict[str, Runs]) -> list[tuple[int, float]]:
    """Steps and learning rates of the runs to make: the first seed over all learning rates, the others at the best."""
    if side in TWINS:
        twin = runs[TWINS[side]]
        return [(steps_to(target(runs), losses_of(twin)) or max(twin), best_rate(twin))]
    lengths, rates = METHODS[side][1] if side in METHODS else ((), ())
    return list(itertools.product(lengths, rates if seed == SEEDS[0] else [best_rate(runs[side])]))


def key(line: Line) -> tuple[Any, ...]:
    """Key of the run that a curve's line describes."""
    return tuple(line[name] for name in ("task", "side", "steps", "rate", "seed"))


def link(line: Line) -> tuple[float, float]:
    return line["mbit"], line.get("delay_ms", 0)


def named(mbit: float, delay_ms: float) -> str:
    return f"{mbit:g} Mbit/s" + (f", {delay_ms:g} ms" if delay_ms else "")


def table(runs: dict[str, Runs], lines: Iterable[Line]) -> Table:
    """A table of steps and time to dense's final loss, a row per side."""
    lines = list(lines)
    measured = [line for line in lines if line["what"] == "step" and line["task"] == TASK]
    links = sorted({link(line) for line in measured})
    columns = [
        "side",
        "sent per step, kB (ring)",
        "best learning rate (tried)",
        "steps to the target",
        "final loss there: mean (seeds)",
    ]
    shown = Table(*columns, *(f"at {named(*one)}: ms per step; time; dense / this" for one in links))
    for side in sides():
        mine, found = (
            [line for line in measured if line["side"] == side],
            runs.get("dense" if side in ENGINES else side),
        )
        if not mine or not found:
            continue
        losses = losses_of(found)
        reached = steps_to(target(runs), losses)
        steps = reached or max(found)
        tried = sorted({rate for seeds in found.values() for rates in seeds.values() for rate in rates})
        row = [side, f"{mine[-1]['bytes_per_step_ring'] / 1000:,.0f}"]
        row.append(f"{best_rate(found):g} ({', '.join(f'{rate:g}' for rate in tried)})")
        row.append(f"{steps:,}" if reached else f"not in {steps:,}")
        seeds = ", ".join(f"{value:.3f}" for value in losses[steps].values())
        row.append(f"{statistics.mean(losses[steps].values()):.3f} ({seeds})")
        for one in links:
            all_ms = [line["ms_per_step"] for line in mine if link(line) == one]
            theirs = [line["ms_per_step"] for line in measured if line["side"] == "dense" and link(line) == one]
            if not all_ms or not theirs:
                row.append("")
                continue
            took = statistics.median(all_ms) * steps / 1000
            spread = f"{statistics.median(all_ms):.0f} ({min(all_ms):.0f}-{max(all_ms):.0f})"
            ratio = statistics.median(theirs) * TASKS[TASK]["steps"] / 1000 / took
            row.append(f"{spread}; {took:,.0f} s; {ratio:.1f}" if reached else f"{spread}; never")
        shown.add_row(*row)
    if whole_runs := [line for line in lines if line["what"] == "whole"]:
        texts = []
        for line in whole_runs:
            took = f"{line['steps']:,} steps in {line['seconds']:,.0f} s, loss {line['validation_loss']:.3f}"
            texts.append(f"{line['side']} at {named(*link(line))}, {took}")
        shown.caption = f"Whole runs on the hosts: {'; '.join(texts)}"
    return shown


def made() -> Table:
    """Table of everything measured so far."""
    lines = lines_of("time_to_target")
    return table(all_runs(TASK, lines_of("quality"), lines), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="curves|steps|whole", help="what to measure")
    parser.add_argument("--mbit", nargs="+", type=float, default=[100, 1000, 10_000])
    parser.add_argument(
        "--delay-ms", nargs="+", type=float, default=[0], help="of every packet, beside what the lab itself takes"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sides", nargs="*", default=[], help="only these are timed; all unless given")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the curves")
    parser.add_argument("--rates", nargs="*", type=float, help="only curves at these rates are made; all unless given")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    chosen(parser, arguments.what, ["curves", "steps", "whole"])
    chosen(parser, arguments.sides, sides())
    results = ResultFile("time_to_target")
    if "curves" in arguments.what:
        done = {key(line) for line in results.lines() if line["what"] == "curve"}
        for seed in SEEDS[: arguments.seeds]:
            runs = all_runs(TASK, lines_of("quality"), lines_of("time_to_target"))
            for side in arguments.sides or (*TWINS, *METHODS):
                for steps, rate in curves_of(side, seed, runs):
                    wanted = not arguments.rates or rate in arguments.rates
                    if wanted and (TASK, side, steps, rate, seed) not in done:
                        line = curve(side, steps, rate, seed)
                        results.add(line)
                        print(
                            f"{side}, seed {seed}, rate {rate:g}: {line['validation_loss']:.4f} after {steps}",
                            flush=True,
                        )
    if "steps" in arguments.what:
        for repetition in range(arguments.repetitions):
            for mbit, delay in itertools.product(arguments.mbit, arguments.delay_ms):
                for side in arguments.sides or sides():
                    line = step(side, mbit, delay)
                    results.add({**line, "repetition": repetition})
                    print(f"{side}, {mbit:g} Mbit/s, {delay:g} ms: {line['ms_per_step']:.0f} ms", flush=True)
    for side in (arguments.sides or sides()) if "whole" in arguments.what else ():
        runs = all_runs(TASK, lines_of("quality"), lines_of("time_to_target"))
        mine = runs["dense" if side in ENGINES else side]
        if steps := steps_to(target(runs), losses_of(mine)):
            for mbit, delay in itertools.product(arguments.mbit, arguments.delay_ms):
                results.add(line := whole(side, steps, best_rate(mine), mbit, delay))
                print(f"{side}, {named(mbit, delay)}: {line['steps']} steps in {line['seconds']:.0f} s", flush=True)
    if arguments.table or not arguments.what:
        Console(width=200).print(made())


if __name__ == "__main__":
    main()
