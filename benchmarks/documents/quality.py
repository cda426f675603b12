"""Tables of quality by learning rate, morph and length of run, and of models of `transformers`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.documents.sizes import MODELS
from benchmarks.markdown import bold_least, each, grid, short
from benchmarks.network.target_runs import TARGET_SUITES, all_runs, losses_of, side_of
from benchmarks.quality import architectures, paper_architectures
from benchmarks.quality.cells import DEFAULT, SEEDS, cell, identity
from benchmarks.quality.further_suites import TARGETS
from benchmarks.quality.suites import MORPHS, MORPHS_AT
from benchmarks.quality.suites import budgets as budget_cells
from benchmarks.quality.tasks import TASKS
from benchmarks.result_files import lines_of

Line = dict[str, Any]
MORPH_NAMES = {
    DEFAULT: "**offset, chunks of 16 (default)**",
    **{f"offset:chunk={n}": f"offset, chunks of {n}" for n in (8, 9, 64)},
    "offset:chunk=16,gains=false": "no gains",
    "offset:chunk=16,gains=true": "with gains",
    "offset:chunk=16,templates=2": "two templates",
    "inter": "inter, four templates (its default until 2026-11-28)",
    **{f"offset:chunk=16,rank={n}": f"a low-rank difference, rank {n}" for n in (2, 4)},
}


def _by_identity() -> dict[str, Line]:
    return {identity(line): line for line in lines_of("quality")}


def lengths(task: str) -> str:
    """Mean losses of suite `target` by method and steps, with the number of seeds. Bold: at or below dense's."""
    losses = {side: losses_of(runs) for side, runs in all_runs(task, lines_of("quality"), []).items()}
    sizes = {
        side_of(line): line["parameters"]
        for line in lines_of("quality")
        if line["task"] == task and line["suite"] in TARGET_SUITES
    }
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
    """budget (None: dense) → learning rate → the loss of each seed."""
    found: dict[float | None, dict[float, list[float]]] = {}
    wanted = {identity(one) for one in budget_cells()}
    for line in lines_of("quality"):
        overrides = line["overrides"]
        if identity(line) in wanted and overrides["optimizer.name"] == optimizer:
            rates = found.setdefault(overrides.get("share.budget"), {})
            rates.setdefault(overrides["optimizer.lr"], []).append(line["validation_loss"])
    return found


def budgets(optimizer: str) -> str:
    """Mean losses of three seeds by budget and learning rate."""
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
    rate, known = MORPHS_AT[task]["optimizer.lr"], _by_identity()
    found: list[tuple[str, list[Line]]] = []
    variants: list[tuple[str, dict[str, Any]]] = [
        (MORPH_NAMES.get(m, m), {"share.morph": m}) for m in (DEFAULT, *MORPHS[task])
    ]
    variants += [("a bank per shape", {"share.mapping": "shape"}), ("two banks by depth", {"share.mapping": "depth:2"})]
    for name, more in variants:
        wanted = [
            cell(task, "shared", rate, more=MORPHS_AT[task] | more | ({"share.seed": seed} if seed else {}))
            for seed in SEEDS[:2]
        ]
        found.append((name, [known[identity(one)] for one in wanted if identity(one) in known]))
    what, scale, shown, sign = "validation_loss", 1.0, ".3f", 1
    if "validation_accuracy" in found[0][1][0]:
        what, scale, shown, sign = "validation_accuracy", 100.0, ".2f", -1
    found.sort(key=lambda item: sign * statistics.mean(run[what] for run in item[1]))
    rows = [[name, each((scale * run[what] for run in runs), shown)] for name, runs in found]
    quality = "accuracy in %" if sign < 0 else "validation loss"
    return grid((f"{MODELS[task]}, learning rate {short(rate)}", f"{quality}, by mapping seed"), rows)


def four_architectures() -> str:
    """Models of `transformers` beside their dense twins."""
    return grid(architectures.HEADINGS, list(map(list, architectures.rows(lines_of("architectures")))))


def nine_architectures() -> str:
    """Architectures of the paper at small scale, beside their dense twins and dense models of their size."""
    lines = lines_of("paper_architectures")
    return grid(paper_architectures.HEADINGS, list(map(list, paper_architectures.rows(lines))))


def _of(function: Callable[[str], str], arguments: Sequence[str]) -> dict[str, Callable[[], str]]:
    return {f"{function.__name__.replace('_', '-')}-{name}": lambda name=name: function(name) for name in arguments}


TABLES: dict[str, Callable[[], str]] = {
    **_of(lengths, list(TARGETS)),
    **_of(morphs, list(MORPHS)),
    **_of(budgets, ["adamw", "sgd"]),
    "architectures": four_architectures,
    "paper-architectures": nine_architectures,
}
