"""Quality at equal data, batch and steps: shared models against dense ones, each at its own best learning rate.

    python -m benchmarks.quality rates controls morphs confirm budgets [--jobs 2]     # resumable: measured cells stay
    python -m benchmarks.quality --table

Every cell is one run of `dist_ssn.train` on one thread; its line in `results/quality/` holds the recipe's overrides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_ssn.plan import make_plan
from dist_ssn.specs import find_specs
from dist_ssn.train.loop import train
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe import Recipe
from dist_ssn.train.recipe_file import load_recipe

from .results import ResultFile, chosen, provenance
from .tasks import EQUAL, TASKS

Cell = dict[str, Any]

_ADAMW, _SGD = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2), (0.05, 0.1, 0.2, 0.4, 0.8)
RATES: dict[str, tuple[float, ...]] = {"gpt": _ADAMW, "wrn": _SGD, "lstm": _ADAMW, "vit": _ADAMW}
KINDS = ("dense", "equal", "shared")
CONTROLS = ("tied", "hashed", "hashed-global", "lowrank")
"""Kinds that are controls at the budget of "shared"; docs/search.md says what each is."""
CONTROL_RATES: dict[str, tuple[float, ...]] = {"gpt": (*_ADAMW, 4.8e-2), "wrn": _SGD}
"""One rate more for Adam, which nothing raises for a control as `parameter_groups` does for a bank."""
DEFAULT = "offset:chunk=16"
"""What "auto" chooses below a budget of 1 (gains where a weight is a matrix), named so that a line says what it measured."""
MORPHS: dict[str, tuple[str, ...]] = {
    "gpt": (
        *("offset:chunk=64", "offset:chunk=8", "offset:chunk=16,gains=false", "offset:chunk=16,templates=2"),
        *("offset:chunk=16,rank=4", "hash", "inter", "mask"),
    ),
    "wrn": (
        *("offset:chunk=64", "offset:chunk=9", "offset:chunk=16,gains=true", "offset:chunk=16,templates=2"),
        *("offset:chunk=16,rank=2", "hash", "inter", "mask"),
    ),
}
SEEDS = (0, 1, 2)


def cell(task: str, kind: str, lr: float, seed: int = 0, more: dict[str, Any] | None = None) -> Cell:
    """One run: `kind` is one of KINDS or CONTROLS; `more` are overrides of the recipe."""
    overrides: dict[str, Any] = {"model_args": EQUAL[task]} if kind == "equal" else {}
    overrides |= {"share.budget": 0.1, "share.morph": DEFAULT} if kind == "shared" else {}
    overrides |= {"share.budget": 0.1, "share.control": kind} if kind in CONTROLS else {}
    return {"task": task, "kind": kind, "seed": seed, "overrides": {**overrides, "optimizer.lr": lr, **(more or {})}}


def rates() -> Iterator[Cell]:
    """Each method's learning rate over a grid of factor 2, one seed."""
    for task, grid in RATES.items():
        for kind in KINDS:
            for lr in grid:
                yield cell(task, kind, lr)


def controls() -> Iterator[Cell]:
    """Each control's learning rate over a grid of its own, one seed; `confirm` goes on with further seeds."""
    for task, grid in CONTROL_RATES.items():
        for kind in CONTROLS:
            for lr in grid:
                yield cell(task, kind, lr)


def morphs() -> Iterator[Cell]:
    """Every morph at 10 % and the default's best rate, over seeds of its mapping; the default over mappings, too."""
    best = best_rates(ResultFile("quality").lines())
    for task, names in MORPHS.items():
        for seed in SEEDS[:2]:
            for morph in (DEFAULT, *names) if seed else names:  # the default at seed 0 is a cell of `rates`
                more = {"share.morph": morph} | ({"share.seed": seed} if seed else {})
                yield cell(task, "shared", best[task, "shared"], more=more)
        for mapping in ("shape", "depth:2"):
            yield cell(task, "shared", best[task, "shared"], more={"share.mapping": mapping})


def confirm() -> Iterator[Cell]:
    """Three seeds (of weights, data and mapping together) at each method's two best rates: one may be luck."""
    for (task, kind), losses in _losses(ResultFile("quality").lines(), seeds=SEEDS[:1]).items():
        for lr in sorted(losses, key=lambda lr: losses[lr])[:2]:
            for seed in SEEDS[1:]:
                yield cell(task, kind, lr, seed, seeded(kind, seed))


def seeded(kind: str, seed: int) -> dict[str, Any]:
    """What else a seed decides: where a weight reads the bank, or its buckets."""
    return {"share.seed": seed} if seed and kind not in ("dense", "equal") else {}


def budgets() -> Iterator[Cell]:
    """Where the best rate lies at each budget, for AdamW and SGD: the mean of three seeds."""
    for optimizer, grid in {"adamw": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "sgd": (0.05, 0.1, 0.2, 0.4, 0.8)}.items():
        for budget in (None, 0.02, 0.1, 0.5, 1.0):
            shared = {"share.budget": budget, "share.morph": "auto"} if budget else {}
            for lr in (*grid, 6.4e-2) if (optimizer, budget) == ("adamw", 0.02) else grid:
                for seed in SEEDS:
                    yield cell("gpt-small", "budgets", lr, seed, {"optimizer.name": optimizer, **shared})


TEACHERS: dict[str, dict[str, Any]] = {
    "none": {},
    "half": {"distill.teacher": "dense", "distill.weight": 0.5},
    "most": {"distill.teacher": "dense", "distill.weight": 0.9},
    "half, hidden": {"distill.teacher": "dense", "distill.weight": 0.5, "distill.hidden": ["blocks.?"]},
}
"""What a dense twin teaches: a part of the loss, and hidden states after each block."""


def distill() -> Iterator[Cell]:
    """Banks of the GPT with and without their dense twin as a teacher, at the default's best rate; two ways with one seed."""
    lr = best_rates(ResultFile("quality").lines())["gpt", "shared"]
    for seed, budget, (name, teacher) in itertools.product(SEEDS, (0.1, 0.02), TEACHERS.items()):
        if seed == SEEDS[0] or name in ("none", "half"):
            more = {**({} if budget == 0.1 else {"share.budget": budget}), **teacher, **seeded("shared", seed)}
            yield cell("gpt", "shared", lr, seed, more)


def wider() -> Iterator[Cell]:
    """Wider GPTs with as many parameters as the usual one has at 10 %: the same bytes, and more compute."""
    usual = find_specs(build_model("gpt", TASKS["gpt"]["model_args"]))
    whole = make_plan(usual, 0.1).parameters + usual.own_parameters
    for width, lr in itertools.product((192, 256), (1.5e-3, 3e-3)):
        sizes = {**TASKS["gpt"]["model_args"], "width": width}
        own = find_specs(build_model("gpt", sizes)).own_parameters
        yield cell("gpt", "shared", lr, more={"model_args": sizes, "share.budget": whole - own})


def longer() -> Iterator[Cell]:
    """The GPT with four times the steps, dense and shared, at the best rate of the usual run and half of it."""
    for kind, rates in {"dense": (3e-3, 6e-3), "shared": (1.5e-3, 3e-3), "equal": (6e-3, 1.2e-2)}.items():
        for lr in rates:
            yield cell("gpt", kind, lr, more={"steps": 2000})


PRUNED: dict[str, tuple[str, dict[str, Any], int]] = {
    "10 %": ("shared", {}, 3),
    "20 %, half of its bank": ("shared", {"share.budget": 0.2, "prune.final": 0.5}, 3),
    "5 %": ("shared", {"share.budget": 0.05}, 3),
    "10 %, half of its bank": ("shared", {"prune.final": 0.5}, 3),
    "10 %, half of its weights": ("shared", {"prune.final": 0.5, "prune.what": "weights"}, 1),
    "10 %, 90 % of its weights": ("shared", {"prune.final": 0.9, "prune.what": "weights"}, 1),
    "dense, 90 % of its weights": ("dense", {"prune.final": 0.9, "prune.what": "weights"}, 1),
}
"""What is pruned → kind, settings (all is pruned after three quarters of the run), seeds."""


def prune() -> Iterator[Cell]:
    """The GPT, pruned while it trains, beside banks that are as small from the start; each kind's best rate."""
    best = best_rates(ResultFile("quality").lines())
    for kind, settings, seeds in PRUNED.values():
        for seed in SEEDS[:seeds]:
            end = {"prune.end": TASKS["gpt"]["steps"] * 3 // 4} if "prune.final" in settings else {}
            yield cell("gpt", kind, best["gpt", kind], seed, {**settings, **end, **seeded(kind, seed)})


Side = str | float
"""A kind of dense model, or the budget of a shared one."""
TARGETS: dict[str, dict[Side, tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "gpt": {
        "dense": ((500,), (6e-3,)),
        "equal": ((500, 1000, 2000), (1.2e-2,)),
        **{budget: ((350, 500), (3e-3, 6e-3)) for budget in (0.1, 0.25, 0.5)},
        0.05: ((500, 1000), (3e-3, 6e-3)),
        0.02: ((500, 1000, 2000), (3e-3, 6e-3)),
    },
    "gpt-wide": {
        "dense": ((1500,), (1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3)),
        "equal": ((1500, 2000, 3000), (7.5e-4, 1.5e-3, 3e-3)),
        0.5: ((1250, 1500), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.25: ((1250, 1500), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.1: ((1000, 1250, 1500), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.05: ((1250, 1500, 2000), (3.75e-4, 7.5e-4, 1.5e-3)),
        0.02: ((1500, 2000, 3000), (3.75e-4, 7.5e-4, 1.5e-3)),
    },
}
"""task → side → steps of the runs that may come to the loss at which the dense run ends, and rates for each."""


def target(seeds: tuple[int, ...] = SEEDS[:1]) -> Iterator[Cell]:
    """Runs of several lengths, each with a schedule of its own; one seed over the rates."""
    for (task, sides), seed in itertools.product(TARGETS.items(), seeds):
        every = 50 if task == "gpt" else TASKS[task]["evaluate_every"]
        for side, (lengths, rates) in sides.items():
            kind = side if isinstance(side, str) else "shared"
            for steps, lr in itertools.product(lengths, rates):
                more: dict[str, Any] = {"steps": steps, "evaluate_every": every}
                more |= {} if isinstance(side, str) else {"share.budget": side, **seeded("shared", seed)}
                yield cell(task, kind, lr, seed, more)


def target_confirm() -> Iterator[Cell]:
    """The other seeds of `target`, each length at the best rate of the first; none where that was not measured."""
    measured = {identity(line): line for line in ResultFile("quality").lines()}
    best: dict[str, Cell] = {}
    for one in target():
        line = measured.get(identity(one))
        name = identity({**one, "overrides": {**one["overrides"], "optimizer.lr": None}})
        if line is not None and (name not in best or line["validation_loss"] < best[name]["validation_loss"]):
            best[name] = line
    chosen = {identity(line) for line in best.values()}
    for one in target(SEEDS[1:]):
        first = {key: value for key, value in one["overrides"].items() if key != "share.seed"}
        if identity({**one, "seed": SEEDS[0], "overrides": first}) in chosen:
            yield one


SUITES: dict[str, Callable[[], Iterator[Cell]]] = {
    "rates": rates,
    "controls": controls,
    "morphs": morphs,
    "confirm": confirm,
    "budgets": budgets,
    "distill": distill,
    "prune": prune,
    "longer": longer,
    "wider": wider,
    "target": target,
    "target-confirm": target_confirm,
}


def run(wanted: Cell) -> Cell:
    """Trains one cell in this process; returns it with its measurements."""
    commit = provenance()["commit"]
    with tempfile.TemporaryDirectory() as folder:
        row = train(recipe_of(wanted, folder), progress=False).row
    row.pop("name")
    history = [{key: point[key] for key in ("step", "validation_loss")} for point in row.pop("history")]
    return {**wanted, **row, "history": history, "commit": commit}


def recipe_of(wanted: Cell, folder: str) -> Recipe:
    """A cell's run, on one thread."""
    settings = {**TASKS[wanted["task"]], **wanted["overrides"], "seed": wanted["seed"], "output": folder, "threads": 1}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return load_recipe(None, [f"--{key}={text}" for key, text in texts.items()])


def identity(measured: Cell) -> str:
    return json.dumps({key: measured[key] for key in ("task", "kind", "seed", "overrides")}, sort_keys=True)


def best_rates(lines: Iterable[Cell]) -> dict[tuple[str, str], float]:
    """(task, kind) → the rate of the lowest validation loss, in the mean of all seeds where `confirm` has measured them."""
    lines = list(lines)
    best = {}
    for key, once in _losses(lines, seeds=SEEDS[:1]).items():
        losses = _losses(lines, seeds=SEEDS).get(key) or once
        best[key] = min(losses, key=lambda lr: losses[lr])
    return best


def _losses(lines: Iterable[Cell], seeds: tuple[int, ...]) -> dict[tuple[str, str], dict[float, float]]:
    """(task, kind) → rate → mean validation loss of these seeds, for rates where all of them were measured."""
    measured = {identity(line): line["validation_loss"] for line in lines}
    found: dict[tuple[str, str], dict[float, float]] = {}
    for one in itertools.chain(rates(), controls()):
        task, kind, lr = one["task"], one["kind"], one["overrides"]["optimizer.lr"]
        more = [seeded(kind, seed) for seed in seeds]
        losses = [measured.get(identity(cell(task, kind, lr, seed, m))) for seed, m in zip(seeds, more, strict=True)]
        if None not in losses:
            found.setdefault((task, kind), {})[lr] = statistics.mean(losses)  # type: ignore[type-var]
    return found


def table(lines: list[Cell]) -> Table:
    """Mean, spread and number of seeds of each method, best first within its task."""
    methods: dict[tuple[str, str, str], list[Cell]] = {}
    for line in lines:
        shown = {k: v for k, v in line["overrides"].items() if k not in ("model_args", "share.seed")}
        methods.setdefault((line["task"], line["kind"], json.dumps(shown)), []).append(line)
    result = Table("task", "kind", "settings", "parameters", "validation loss", "spread", "accuracy", "runs")
    for (task, kind, shown), runs in sorted(
        methods.items(), key=lambda item: (item[0][0], _mean(item[1], "validation_loss"))
    ):
        losses = [run["validation_loss"] for run in runs]
        accuracy = f"{_mean(runs, 'validation_accuracy'):.4f}" if "validation_accuracy" in runs[0] else ""
        spread = f"{max(losses) - min(losses):.4f}" if len(runs) > 1 else ""
        mean = f"{statistics.mean(losses):.4f}"
        result.add_row(task, kind, shown, f"{runs[0]['parameters']:,}", mean, spread, accuracy, str(len(runs)))
    return result


def _mean(runs: list[Cell], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="only these")
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="cells whose line has one of these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="print what is measured so far")
    arguments = parser.parse_args()
    results = ResultFile("quality")
    for suite in chosen(parser, arguments.suites, SUITES):
        done = {identity(line) for line in results.lines()}
        cells = [one for one in SUITES[suite]() if one["task"] in arguments.tasks]
        named = {identity(one): one for one in cells if any(text in identity(one) for text in arguments.only)}
        wanted = [one for name, one in named.items() if name not in done]
        for line in results.measure(run, wanted, arguments.jobs, suite=suite):
            print(f"  {line['validation_loss']:.4f}  {identity(line)}", flush=True)
    if arguments.table or not arguments.suites:
        Console(width=200).print(table(list(results.lines())))


if __name__ == "__main__":
    main()
