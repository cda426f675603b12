"""Tables of quality, from the lines of `benchmarks.quality`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .. import architectures, searches
from ..quality import (
    DEFAULT,
    MORPHS,
    PRUNED,
    SEEDS,
    TARGETS,
    TASKS,
    TEACHERS,
    best_rates,
    cell,
    distill,
    identity,
    longer,
    prune,
    seeded,
)
from ..results import lines_of
from ..target_runs import all_runs, losses_of, side_of
from .markdown import bold_least, each, grid, mean, short

Line = dict[str, Any]
NAMES = {"dense": "dense", "shared": "**10 % bank**", "equal": "dense, as small as that"}
MODELS = {"gpt": "GPT, 4 layers of width 128", "wrn": "Wide ResNet 16-2"}
MORE_MODELS = {"lstm": "LSTM, 2 layers of width 128", "vit": "ViT, 4 layers of width 64"}
MORPH_NAMES = {
    DEFAULT: "**offset, chunks of 16 (default)**",
    **{f"offset:chunk={n}": f"offset, chunks of {n}" for n in (8, 9, 64)},
    "offset:chunk=16,gains=false": "no gains",
    "offset:chunk=16,gains=true": "with gains",
    "offset:chunk=16,templates=2": "two templates",
    **{f"offset:chunk=16,rank={n}": f"a low-rank difference, rank {n}" for n in (2, 4)},
}


def _by_identity() -> dict[str, Line]:
    return {identity(line): line for line in lines_of("quality")}


def _at_best(task: str, kind: str) -> tuple[float, list[Line]]:
    """A kind's best rate, and its line for each seed."""
    rate, known = best_rates(lines_of("quality"))[task, kind], _by_identity()
    return rate, [known[identity(cell(task, kind, rate, seed, seeded(kind, seed)))] for seed in SEEDS]


def against_equal(task: str) -> str:
    """Dense, 10 % and equal-parameter dense at their best rates: losses, and accuracies where there are any."""
    rows = []
    for kind, name in NAMES.items():
        rate, runs = _at_best(task, kind)
        losses = [run["validation_loss"] for run in runs]
        row = [name, f"{runs[0]['parameters']:,}", short(rate), f"{statistics.mean(losses):.3f}", each(losses)]
        if "validation_accuracy" in runs[0]:
            accuracies = [100 * run["validation_accuracy"] for run in runs]
            row += [f"{statistics.mean(accuracies):.2f}", each(accuracies, ".2f")]
        rows.append(row)
    headings = ["", "parameters", "best rate", "validation loss, mean", "seed by seed"]
    return grid([*headings, "accuracy in %, mean", "seed by seed"][: len(rows[0])], rows)


def in_short() -> str:
    """Both tasks, for README."""
    rows = []
    for task, model in MODELS.items():
        for kind, name in NAMES.items():
            _, runs = _at_best(task, kind)
            if "validation_accuracy" in runs[0]:
                values = [100 * run["validation_accuracy"] for run in runs]
                quality = f"accuracy {statistics.mean(values):.1f} % ({each(values, '.1f')})"
            else:
                values = [run["validation_loss"] for run in runs]
                quality = f"loss {statistics.mean(values):.3f} ({each(values)})"
            numbers = runs[0]["parameters"]
            named = f"{model}: {name}" if kind == "dense" else name
            rows.append([named, f"{numbers:,}", f"{4e-6 * numbers:.2f} MB", quality])
    return grid(("", "trainable", "sent per step", "quality, mean (seed by seed)"), rows)


def lengths(task: str) -> str:
    """Losses of `target` by side and steps, means over the seeds that are there; bold: at or below dense's."""
    losses = {side: losses_of(runs) for side, runs in all_runs(task, lines_of("quality"), []).items()}
    sizes = {side_of(line): line["parameters"] for line in lines_of("quality") if line["task"] == task}
    columns = sorted({steps for runs in losses.values() for steps in runs})
    target = statistics.mean(losses["dense"][TASKS[task]["steps"]].values())
    rows = []
    for side in sorted(losses, key=lambda side: sizes[side]):
        texts = []
        for steps in columns:
            values = list(losses[side].get(steps, {}).values())
            text = f"{statistics.mean(values):.3f}" if values else ""
            reached = f"**{text}**" if values and statistics.mean(values) <= target else text
            texts.append(f"{reached} ({len(values)})" if values else "")
        rows.append([side, f"{sizes[side]:,}", *texts])
    return grid(("", "parameters", *(f"{steps:,} steps" for steps in columns)), rows)


def losses_by_budget(optimizer: str) -> dict[float | None, dict[float, list[float]]]:
    """budget (None: dense) → rate → the loss of each seed."""
    found: dict[float | None, dict[float, list[float]]] = {}
    for line in lines_of("quality"):
        overrides = line["overrides"]
        if line["kind"] == "budgets" and overrides["optimizer.name"] == optimizer:
            rates = found.setdefault(overrides.get("share.budget"), {})
            rates.setdefault(overrides["optimizer.lr"], []).append(line["validation_loss"])
    return found


def budgets(optimizer: str) -> str:
    """Mean losses of three seeds by budget and rate."""
    found = losses_by_budget(optimizer)
    rates = sorted({rate for losses in found.values() for rate, seeds in losses.items() if len(seeds) == len(SEEDS)})
    rows = []
    for budget, losses in sorted(found.items(), key=lambda item: item[0] or 0):
        there = [rate for rate in rates if len(losses.get(rate, [])) == len(SEEDS)]
        texts = bold_least([statistics.mean(losses[rate]) for rate in there], lambda value: f"{value:.3f}")
        shown = dict(zip(there, texts, strict=True))
        rows.append([f"{budget:.0%}" if budget else "dense", *(shown.get(rate, "") for rate in rates)])
    return grid(({"adamw": "AdamW", "sgd": "SGD"}[optimizer], *(short(rate) for rate in rates)), rows)


def morphs(task: str) -> str:
    """Every morph at 10 %, seeds of its mapping one by one, best mean first."""
    rate, known = best_rates(lines_of("quality"))[task, "shared"], _by_identity()
    found: list[tuple[str, list[Line]]] = []
    variants: list[tuple[str, dict[str, Any]]] = [
        (MORPH_NAMES.get(m, m), {"share.morph": m}) for m in (DEFAULT, *MORPHS[task])
    ]
    variants += [("a bank per shape", {"share.mapping": "shape"}), ("two banks by depth", {"share.mapping": "depth:2"})]
    for name, more in variants:
        wanted = [
            cell(task, "shared", rate, more={**more, **({"share.seed": seed} if seed else {})}) for seed in SEEDS[:2]
        ]
        found.append((name, [known[identity(one)] for one in wanted if identity(one) in known]))
    what, scale, shown, sign = "validation_loss", 1.0, ".3f", 1
    if "validation_accuracy" in found[0][1][0]:
        what, scale, shown, sign = "validation_accuracy", 100.0, ".2f", -1
    found.sort(key=lambda item: sign * statistics.mean(run[what] for run in item[1]))
    rows = [[name, each((scale * run[what] for run in runs), shown)] for name, runs in found]
    quality = "accuracy in %" if sign < 0 else "validation loss"
    return grid((f"{MODELS[task]}, rate {short(rate)}", f"{quality}, by mapping seed"), rows)


def with_more_steps() -> str:
    """The GPT's usual run and one of four times the steps, one seed: each side at the better of its rates."""
    known, cells = _by_identity(), list(longer())
    rows = []
    for kind, name in NAMES.items():
        short_run = known[identity(cell("gpt", kind, best_rates(known.values())["gpt", kind]))]
        long_runs = [known[identity(one)] for one in cells if one["kind"] == kind and identity(one) in known]
        if long_runs:
            both = short_run, min(long_runs, key=lambda line: line["validation_loss"])
            texts = [f"{line['validation_loss']:.3f} ({short(line['overrides']['optimizer.lr'])})" for line in both]
            rows.append([name, f"{short_run['parameters']:,}", *texts])
    return grid(("", "parameters", "500 steps: loss (rate)", "2,000 steps"), rows)


def distilled() -> str:
    """Banks with and without a teacher: losses of the seeds that are there."""
    known, losses = _by_identity(), {}
    for one in distill():
        more = one["overrides"]
        teacher = {key: value for key, value in more.items() if key.startswith("distill.")}
        name = next(name for name, settings in TEACHERS.items() if settings == teacher)
        if identity(one) in known:
            losses.setdefault((name, more["share.budget"]), []).append(known[identity(one)]["validation_loss"])
    budgets = sorted({budget for _, budget in losses}, reverse=True)
    rows = []
    for name in TEACHERS:
        found = [losses.get((name, budget), []) for budget in budgets]
        rows.append([name, *(mean(seeds) if seeds else "" for seeds in found)])
    return grid(("the teacher's part of the loss", *(f"a bank of {budget:.0%}" for budget in budgets)), rows)


def pruned() -> str:
    """What is pruned: numbers that are trained and sent, and what is left of those that were pruned; losses seed by seed."""
    known, rows = _by_identity(), []
    cells = iter(prune())
    for name, (*_, seeds) in PRUNED.items():
        found = [known[identity(one)] for one in itertools.islice(cells, seeds) if identity(one) in known]
        if found:
            left = f"{found[0]['kept_numbers']:,}" if "kept_numbers" in found[0] else ""
            losses = [line["validation_loss"] for line in found]
            rows.append([name, f"{found[0]['parameters']:,}", left, mean(losses)])
    return grid(("what is pruned", "trained and sent", "numbers left", "validation loss, mean (seed by seed)"), rows)


def found_by_search(task: str) -> str:
    return grid(searches.HEADINGS, searches.rows(lines_of("searches"), task))


def four_architectures() -> str:
    """Models of `transformers` beside their dense twins."""
    return grid(architectures.HEADINGS, list(map(list, architectures.rows(lines_of("architectures")))))


def _of(function: Callable[[str], str], arguments: Sequence[str]) -> dict[str, Callable[[], str]]:
    return {f"{function.__name__.replace('_', '-')}-{name}": lambda name=name: function(name) for name in arguments}


TABLES: dict[str, Callable[[], str]] = {
    "quality-in-short": in_short,
    **_of(lengths, list(TARGETS)),
    **_of(against_equal, [*MODELS, *MORE_MODELS]),
    **_of(morphs, list(MODELS)),
    **_of(budgets, ["adamw", "sgd"]),
    "with-more-steps": with_more_steps,
    "distilled": distilled,
    "pruned": pruned,
    **_of(found_by_search, list(searches.RATES)),
    "architectures": four_architectures,
}
