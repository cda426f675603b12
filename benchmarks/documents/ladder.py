"""Tables of the ladder: how alike the workers' changes are, and loss at equal steps against bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.ladder.cells import NAMES, identity
from benchmarks.ladder.suites import LONG, SHORT, agreement
from benchmarks.markdown import grid, mean, short
from benchmarks.result_files import lines_of

Line = dict[str, Any]
Rung = tuple[str, float | None, int, str]
"""Kind, budget, period, codec."""
CODECS = {"none": "32 bits", "int8": "8 bits", "int4": "4 bits", "bins2": "2 bits", "sparse": "sparse"}
AUTHORS = {(1.0, 0.0): "average", (0.7, 0.9): "0.7, 0.9", (0.7, 0.6): "0.7, 0.6"}


def model_name(kind: str, budget: float | None) -> str:
    """Name of a model in tables and figures."""
    if budget is None:
        return "dense"
    named = {"bank": "**bank, {}**", "small": "dense, as small as {}", "hashed": "hashed, {}"}
    return named[kind].format(f"{100 * budget:g} %")


def lines_by_cell() -> dict[str, Line]:
    """The newest line of each cell."""
    return {identity(line): line for line in lines_of("ladder")}


def loss_of(runs: Iterable[Line]) -> float:
    return statistics.mean(run["validation_loss"] for run in runs)


def rungs(task: str) -> dict[Rung, list[Line]]:
    """Rung → its runs, a seed each, at the setting with the most seeds; among equals, the one with the least mean loss."""
    settings: dict[Rung, dict[tuple[Any, ...], list[Line]]] = {}
    for line in lines_by_cell().values():
        if line["task"] == task:
            rung = (line["kind"], line["budget"], line["every"], line["codec"])
            settings.setdefault(rung, {}).setdefault((line["lr"], *line["outer"]), []).append(line)
    found = {rung: min(runs.values(), key=lambda runs: (-len(runs), loss_of(runs))) for rung, runs in settings.items()}
    return {rung: sorted(runs, key=lambda run: run["seed"]) for rung, runs in found.items()}


DENSE: Rung = ("dense", None, 1, "none")


def frontier(task: str) -> str:
    """Every rung, by bytes. Bold losses: no rung with fewer bytes has a lower mean loss."""
    found = rungs(task)
    dense = found[DENSE]
    rows, least = [], float("inf")
    for (kind, budget, every, codec), runs in sorted(found.items(), key=lambda item: item[1][0]["bytes"]):
        loss, lowest = mean([run["validation_loss"] for run in runs]), loss_of(runs) < least
        least = min(least, loss_of(runs))
        line = runs[0]
        outer = "" if every == 1 else AUTHORS[tuple(line["outer"])]
        fewer = f"{dense[0]['bytes'] / line['bytes']:,.0f}" if line is not dense[0] else ""
        apart = f"{loss_of(runs) / loss_of(dense) - 1:+.1%}" if line is not dense[0] else ""
        settings = (model_name(kind, budget), str(every), CODECS[codec], short(line["lr"]), outer)
        sizes = (megabytes(line["bytes"]), megabytes(line["ring_bytes"]), fewer)
        rows.append([*settings, *sizes, f"**{loss}**" if lowest else loss, apart])
    headings = (
        "model",
        "every",
        "codec",
        "learning rate",
        "outer",
        "MB handed over",
        "MB sent",
        "times fewer",
        "loss",
        "from dense",
    )
    return grid([NAMES[task], *headings[1:]], rows)


def megabytes(size: float) -> str:
    return f"{size / 1e6:.3g}" if size < 1e8 else f"{size / 1e6:.0f}"


def tuning(task: str) -> str:
    """Losses of seed 0 at every learning rate and outer setting of a period, for models that were tuned; bold: the best."""
    found: dict[tuple[str, int, str, str], dict[float, float]] = {}
    for line in lines_by_cell().values():
        if line["task"] == task and line["seed"] == 0:
            outer = "" if line["every"] == 1 else AUTHORS[tuple(line["outer"])]
            group = (model_name(line["kind"], line["budget"]), line["every"], CODECS[line["codec"]], outer)
            found.setdefault(group, {})[line["lr"]] = line["validation_loss"]
    rungs_of: dict[tuple[str, int, str], list[float]] = {}
    for (name, every, codec, _), losses in found.items():
        rungs_of.setdefault((name, every, codec), []).extend(losses.values())
    kept = {group: losses for group, losses in found.items() if len(rungs_of[group[:3]]) > 1}
    rates = sorted({rate for losses in kept.values() for rate in losses})
    rows = []
    for (name, every, codec, outer), losses in sorted(
        kept.items(), key=lambda item: (item[0][0].strip("*"), *item[0][1:])
    ):
        best = min(rungs_of[name, every, codec])
        texts = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        shown = [f"**{text}**" if losses.get(rate) == best else text for rate, text in zip(rates, texts, strict=True)]
        rows.append([name, str(every), codec, outer, *shown])
    return grid((NAMES[task], "every", "codec", "outer", *map(short, rates)), rows)


def agreements() -> str:
    """Mean over a run, and means of its first and last quarter, by model and period."""
    known, rows = lines_by_cell(), {}
    for one in agreement([]):
        if (line := known.get(identity(one))) is not None:
            rows.setdefault((one["task"], one["kind"], one["budget"]), {})[one["every"]] = line
    made = []
    for (task, kind, budget), runs in rows.items():
        line = next(iter(runs.values()))
        texts = [NAMES[task], model_name(kind, budget), f"{line['parameters']:,}", short(line["lr"])]
        for key in ("cosine", "largest"):
            for every in (SHORT, LONG):
                texts.append(_over_run([point[key] for point in runs[every]["agreement"]]) if every in runs else "")
        made.append(
            [*texts, *(f"{runs[every]['validation_loss']:.3f}" if every in runs else "" for every in (SHORT, LONG))]
        )
    periods = [f"every {every}" for every in (SHORT, LONG)]
    headings = [f"{what}, {period}" for what in ("cosine", "largest 1/64") for period in periods]
    return grid(
        ("task", "model", "parameters", "learning rate", *headings, *(f"loss, {period}" for period in periods)), made
    )


def _over_run(values: Sequence[float]) -> str:
    """Text "mean (first quarter → last quarter)"."""
    quarter = max(1, len(values) // 4)
    ends = (statistics.mean(values[:quarter]), statistics.mean(values[-quarter:]))
    return f"{statistics.mean(values):.2f} ({ends[0]:.2f} → {ends[1]:.2f})"


def _tables() -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {"ladder-agreement": agreements}
    for task in ("gpt", "lstm"):
        found |= {
            f"ladder-{task}": lambda task=task: frontier(task),
            f"ladder-tuning-{task}": lambda task=task: tuning(task),
        }
    return found


TABLES = _tables()
