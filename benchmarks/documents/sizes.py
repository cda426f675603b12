"""Tables of quality by size: banks and other methods with as many parameters, beside the dense model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.markdown import grid, mean, short
from benchmarks.quality.cells import CONTROLS, LOW, LOW_KINDS, RATES, at_best, best_rates, identity, seeds_of
from benchmarks.quality.further_suites import wider
from benchmarks.quality.suites import CURVE, on_curve
from benchmarks.result_files import latest, lines_of

Line = dict[str, Any]
MODELS = {
    "gpt": "GPT, 4 layers of width 128",
    "wrn": "Wide ResNet 16-2",
    "lstm": "LSTM, 2 layers of width 128",
    "vit": "ViT, 4 layers of width 64",
    "captions": "image and text encoder, 2 layers each",
    "digits": "MLP, 3 layers of width 256",
}
KINDS = {
    "dense": "dense",
    "shared": "**bank**",
    "equal": "dense, narrower",
    "shallow": "dense, shallower",
    "tied": "tied",
    "hashed": "hashed, per weight",
    "hashed-global": "hashed, over all weights",
    "lowrank": "low rank",
}

MAPPED = {"shape": "one per shape", "pretrain": "plan by `pretrain`"}
"""Mappings that have rows beside the default's."""


def quality(runs: Sequence[Line]) -> str:
    """Text of the accuracy, or of the loss if the task has none: mean, and each seed (of many, the standard deviation)."""
    if "validation_accuracy" in runs[0]:
        return mean([100 * run["validation_accuracy"] for run in runs], ".1f", " %")
    return losses(runs)


def losses(runs: Sequence[Line]) -> str:
    return mean([run["validation_loss"] for run in runs])


def mean_of(runs: Iterable[Line], what: str = "validation_loss") -> float:
    return statistics.mean(run[what] for run in runs)


def methods(task: str, budget: float) -> dict[str, tuple[float, list[Line]]]:
    """kind → its best learning rate and its runs there, for kinds that were measured at this budget."""
    lines = lines_of("quality")
    known = best_rates(lines, budget)
    found = {kind: at_best(lines, task, kind, budget) for kind in KINDS if (task, kind) in known}
    if budget == LOW:
        found = {"dense": at_best(lines, task, "dense"), **found}
    return found


def by_mapping(task: str) -> dict[str, list[Line]]:
    """mapping → runs of 10 % banks by it, at the default's best learning rate, where all seeds were measured."""
    found: dict[str, list[Line]] = {}
    for line in latest((line for line in lines_of("searches") if line["task"] == task), ("mapping", "seed")).values():
        found.setdefault(line["mapping"], []).append(line)
    return {
        mapping: sorted(runs, key=lambda run: run["seed"])
        for mapping, runs in found.items()
        if mapping != "default" and len(runs) == len(seeds_of(task))
    }


def of_wider(task: str) -> list[Line]:
    """Runs of a wider model's bank, as small as the usual 10 % bank, at the better learning rate with the most seeds."""
    known = {identity(line): line for line in lines_of("quality")}
    by_rate: dict[float, list[Line]] = {}
    for one in wider((task,)):
        if identity(one) in known:
            by_rate.setdefault(one["overrides"]["optimizer.lr"], []).append(known[identity(one)])
    return min(by_rate.values(), key=lambda runs: (-len(runs), mean_of(runs)), default=[])


def mappings() -> str:
    """Losses of 10 % banks by the default mapping, by the former default, and by a bank per shape."""
    known = {identity(line): line for line in lines_of("quality")}
    rows = []
    for task in MODELS:
        tried = [
            [known.get(identity(on_curve(task, 0.1, lr, seed, "scale"))) for seed in seeds_of(task)]
            for lr in RATES[task]
        ]
        complete = [[run for run in runs if run] for runs in tried if all(runs)]
        before = losses(min(complete, key=mean_of)) if complete else ""
        shapes = by_mapping(task).get("shape")
        default = losses(at_best(lines_of("quality"), task, "shared")[1])
        rows.append([MODELS[task], default, before, losses(shapes) if shapes else ""])
    return grid(("", "blocks", "one bank per range of scales", "a bank per shape, at that learning rate"), rows)


def at(budget: float, task: str) -> str:
    """Each kind at its best learning rate, best first; other mappings at the default's, wider models at the better of two."""
    named = [(KINDS[kind], runs) for kind, (_, runs) in methods(task, budget).items()]
    if budget == 0.1:
        mapped = by_mapping(task)
        named += [(f"**bank**, {name}", mapped.get(mapping, [])) for mapping, name in MAPPED.items()]
        named += [("**bank**, wider model", of_wider(task))]
    rows = []
    for name, runs in sorted(((name, runs) for name, runs in named if runs), key=lambda item: mean_of(item[1])):
        row = [name, f"{runs[0]['parameters']:,}", short(runs[0]["overrides"]["optimizer.lr"]), losses(runs)]
        if "validation_accuracy" in runs[0]:
            row.append(mean([100 * run["validation_accuracy"] for run in runs], ".2f"))
        rows.append(row)
    headings = [f"{MODELS[task]}, {budget:.0%}", "parameters", "best learning rate", "validation loss", "accuracy in %"]
    return grid(headings[: len(rows[0])], rows)


def in_short() -> str:
    """Quality of dense, bank and small dense model on two tasks, for README."""
    names = {"dense": "dense", "shared": "**10 % bank**", "equal": "dense, as small as that"}
    rows = []
    for task in ("gpt", "wrn"):
        found = methods(task, 0.1)
        for kind, name in names.items():
            _, runs = found[kind]
            what = "accuracy" if "validation_accuracy" in runs[0] else "loss"
            numbers = runs[0]["parameters"]
            named = f"{MODELS[task]}: {name}" if kind == "dense" else name
            rows.append([named, f"{numbers:,}", f"{4e-6 * numbers:.2f} MB", f"{what} {quality(runs)}"])
    return grid(("", "trainable", "sent per step", "quality, mean (seed by seed)"), rows)


def goals() -> str:
    """Distance of the 10 % bank to dense on each task, and the best other method of its size."""
    rows = []
    for task in MODELS:
        found = {kind: runs for kind, (_, runs) in methods(task, 0.1).items()}
        if not {"dense", "shared"} <= found.keys():
            continue
        dense, bank = (mean_of(found[kind]) for kind in ("dense", "shared"))
        others = {kind: mean_of(runs) for kind, runs in found.items() if kind not in ("dense", "shared")}
        mapped = {name: mean_of(runs) for name, runs in by_mapping(task).items()}
        mapping = min(mapped, key=lambda name: mapped[name], default="")
        best = min(others, key=lambda kind: others[kind])
        apart = ""
        if "validation_accuracy" in found["dense"][0]:
            points = [100 * mean_of(found[kind], "validation_accuracy") for kind in ("shared", "dense", best)]
            apart = f"{points[0] - points[1]:+.2f} (other: {points[2] - points[1]:+.2f})"
        controls = sum(kind in others for kind in ("equal", "shallow", *CONTROLS))
        rows.append(
            [
                *(MODELS[task], f"{dense:.3f}", f"{bank:.3f}", f"{bank / dense - 1:+.1%}", apart),
                f"{mapping}, {mapped[mapping]:.3f} (of {len(mapped)})" if mapping else "",
                f"{KINDS[best]}, {others[best]:.3f}",
                f"{controls}, {_beside(found['shared'], found[best])}",
            ]
        )
    middle = ("from dense", "in points", "best other mapping")
    headings = (
        "",
        "dense",
        "10 % bank",
        *middle,
        "best other method of its size",
        "other methods tried, and the best of them",
    )
    return grid(headings, rows)


def _beside(bank: Sequence[Line], other: Sequence[Line]) -> str:
    """The comparison in words, by the larger of the two standard deviations between seeds."""
    deviations = [statistics.stdev(run["validation_loss"] for run in runs) for runs in (bank, other) if len(runs) > 1]
    if mean_of(bank) <= mean_of(other):
        return "none is better"
    return (
        "the best is within one standard deviation"
        if mean_of(bank) - mean_of(other) <= max(deviations)
        else "the best is better"
    )


def on_curves(task: str, mapping: str | None = None) -> dict[float, list[Line]]:
    """budget → its runs at the better learning rate, among those with the most seeds."""
    known = {identity(line): line for line in lines_of("quality")}
    found = {}
    for budget in CURVE:
        seeds = seeds_of(task)
        tried = [
            [known.get(identity(on_curve(task, budget, lr, seed, mapping))) for seed in seeds] for lr in RATES[task]
        ]
        runs = [[run for run in there if run is not None] for there in tried]
        if most := max((len(there) for there in runs), default=0):
            found[budget] = min((there for there in runs if len(there) == most), key=mean_of)
    return found


EARLIER = {"one bank per range of scales": "scale", "a bank per shape": "shape"}
"""Former default mappings with measured curves: words → mapping."""


def curve() -> str:
    """Quality by budget, a column per task, means of all seeds (in brackets the number, if it is not all).

    Earlier defaults have rows from a budget of 1 on, and elsewhere where the present one was not measured.
    """
    tasks = [task for task in MODELS if len(on_curves(task)) > 1 or len(on_curves(task, "scale")) > 1]
    dense = {task: at_best(lines_of("quality"), task, "dense")[1] for task in tasks}
    now = {task: on_curves(task) for task in tasks}
    rows = [["dense", *(_in_curve(dense[task], task) for task in tasks)]]
    for name, mapping in {"": None, **EARLIER}.items():
        found = {task: on_curves(task, mapping) for task in tasks}
        for budget in CURVE:
            texts = []
            for task in tasks:
                shown = mapping is None or budget >= 1 or budget not in now[task]
                runs = found[task].get(budget, []) if shown else []
                reached = len(runs) == len(seeds_of(task)) and mean_of(runs) <= mean_of(dense[task])
                texts.append(f"**{_in_curve(runs, task)}**" if reached else _in_curve(runs, task))
            if any(texts):
                rows.append([f"{100 * budget:g} %{name and ', '}{name}", *texts])
    return grid(["budget", *(MODELS[task] for task in tasks)], rows)


def _in_curve(runs: Sequence[Line], task: str) -> str:
    if not runs:
        return ""
    accuracy = f", {100 * mean_of(runs, 'validation_accuracy'):.1f} %" if "validation_accuracy" in runs[0] else ""
    count = "" if len(runs) == len(seeds_of(task)) else f" ({len(runs)})"
    return f"{mean_of(runs):.3f}{accuracy}{count}"


def _of(budget: float, tasks: Iterable[str]) -> dict[str, Callable[[], str]]:
    return {f"at-{100 * budget:g}-{task}": lambda task=task: at(budget, task) for task in tasks}


TABLES: dict[str, Callable[[], str]] = {
    "quality-in-short": in_short,
    "goals": goals,
    "mappings": mappings,
    "curve": curve,
    **_of(0.1, MODELS),
    **_of(LOW, LOW_KINDS),
}
