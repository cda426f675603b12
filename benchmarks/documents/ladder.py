"""Tables of the ladder: how alike the workers' changes are, and loss at equal steps against bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.ladder.cells import AVERAGE, NAMES, TASKS, identity
from benchmarks.ladder.longer import known
from benchmarks.ladder.rungs import DENSE, Rung, above_dense, lines_by_cell, loss_of, rungs, shortest
from benchmarks.ladder.suites import DILOCO, FRONTIERS, LONG, NESTEROV, SHORT
from benchmarks.markdown import grid, mean, short
from benchmarks.result_files import lines_of

Line = dict[str, Any]
CODECS = {"none": "32 bits", "int8": "8 bits", "int4": "4 bits", "bins2": "2 bits", "sparse": "sparse"}
OUTERS = {AVERAGE: "average", DILOCO: "0.7, 0.9", NESTEROV: "0.7, 0.6"}
"""Outer learning rate and momentum → words."""


def model_name(kind: str, budget: float | None) -> str:
    """Name of a model in tables and figures."""
    if budget is None:
        return "dense"
    named = {"bank": "**bank, {}**", "small": "dense, as small as {}", "hashed": "hashed, {}"}
    return named[kind].format(f"{100 * budget:g} %")


def frontier(task: str) -> str:
    """Every rung, by bytes. Bold losses: no rung with fewer bytes has a lower mean loss."""
    found = rungs(task)
    dense = found[DENSE]
    rows, least = [], float("inf")
    for (kind, budget, every, codec), runs in sorted(found.items(), key=lambda item: item[1][0]["bytes"]):
        loss, lowest = mean([run["validation_loss"] for run in runs]), loss_of(runs) < least
        least = min(least, loss_of(runs))
        line = runs[0]
        outer = "" if every == 1 else OUTERS[tuple(line["outer"])]
        fewer = f"{dense[0]['bytes'] / line['bytes']:,.0f}" if line is not dense[0] else ""
        apart = f"{above_dense(runs, dense):+.1%}" if line is not dense[0] else ""
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
    """Losses of seed 0 by learning rate and outer setting, of every rung with more than one of them; bold: the best of a rung."""
    found: dict[Rung, dict[str, dict[float, float]]] = {}
    for line in lines_by_cell().values():
        if line["task"] == task and line["seed"] == 0:
            rung = (line["kind"], line["budget"], line["every"], line["codec"])
            outer = "" if line["every"] == 1 else OUTERS[tuple(line["outer"])]
            found.setdefault(rung, {}).setdefault(outer, {})[line["lr"]] = line["validation_loss"]
    tuned = {rung: tried for rung, tried in found.items() if sum(map(len, tried.values())) > 1}
    rates = sorted({rate for tried in tuned.values() for losses in tried.values() for rate in losses})
    rows = []
    for rung in sorted(tuned, key=lambda rung: (*_order(*rung[:2]), *rung[2:])):
        kind, budget, every, codec = rung
        best = min(loss for losses in tuned[rung].values() for loss in losses.values())
        for outer, losses in tuned[rung].items():
            texts = (_bold(losses[rate], losses[rate] == best) if rate in losses else "" for rate in rates)
            rows.append([model_name(kind, budget), str(every), CODECS[codec], outer, *texts])
    return grid((NAMES[task], "every", "codec", "outer", *map(short, rates)), rows)


def _bold(loss: float, is_best: bool) -> str:
    return f"**{loss:.3f}**" if is_best else f"{loss:.3f}"


def agreements() -> str:
    """Mean over a run (first quarter → last quarter), by model and period, each at its best measured setting."""
    best: dict[tuple[str, str, float | None], dict[int, Line]] = {}
    for line in sorted(lines_by_cell().values(), key=lambda line: -line["validation_loss"]):
        if line["codec"] == "none" and line["every"] in (SHORT, LONG) and not line["seed"]:
            best.setdefault((line["task"], line["kind"], line["budget"]), {})[line["every"]] = line
    rows = []
    for task, kind, budget in sorted(best, key=lambda model: (list(NAMES).index(model[0]), *_order(*model[1:]))):
        for every, line in sorted(best[task, kind, budget].items()):
            texts = [NAMES[task], model_name(kind, budget), f"{line['parameters']:,}", str(every), short(line["lr"])]
            texts.append(OUTERS[tuple(line["outer"])])
            texts += [_over_run([point[key] for point in line["agreement"]]) for key in ("cosine", "largest")]
            rows.append([*texts, f"{line['validation_loss']:.3f}"])
    headings = ("model", "parameters", "every", "learning rate", "outer", "cosine", "largest 1/64", "loss")
    return grid(("", *headings), rows)


def _order(kind: str, budget: float | None) -> tuple[int, float]:
    """Order of models in a table: dense, banks, hashed, small dense; the largest first."""
    return ("dense", "bank", "hashed", "small").index(kind), -(budget or 1)


METHODS: tuple[tuple[str, int, str, tuple[float, float]], ...] = (
    ("post-local SGD", SHORT, "none", AVERAGE),
    ("DiLoCo", SHORT, "none", DILOCO),
    ("DiLoCo", LONG, "none", DILOCO),
    ("SparseLoCo", SHORT, "sparse", AVERAGE),
    ("SparseLoCo", LONG, "sparse", AVERAGE),
)
"""Name, period, codec, outer learning rate and momentum of methods of others, by their authors' outer settings."""


def methods(task: str) -> str:
    """Methods of others at their outer settings, beside the best outer setting that was tried (seed 0), dense and on a bank."""
    lines = [line for line in lines_by_cell().values() if line["task"] == task and not line["seed"]]
    rows = []
    for name, every, codec, outer in METHODS:
        texts = [name, str(every), CODECS[codec], OUTERS[outer]]
        for model in (("dense", None), ("bank", 0.25)):
            wanted = (*model, every, codec)
            rung = [line for line in lines if (line["kind"], line["budget"], line["every"], line["codec"]) == wanted]
            theirs = [line for line in rung if tuple(line["outer"]) == outer]
            texts += [
                f"{min(line['validation_loss'] for line in found):.3f}" if found else "" for found in (theirs, rung)
            ]
            texts.append(megabytes(rung[0]["bytes"]) if rung else "")
        if texts[-6] or texts[-3]:
            rows.append(texts)
    headings = [f"{model}, {what}" for model in ("dense", "bank 25 %") for what in ("theirs", "best tried", "MB")]
    return grid((NAMES[task], "every", "codec", "outer", *headings), rows)


GAINS = ("bf16", "int8", "int4", "sparse")


def gains() -> str:
    """Loss of a 25 % bank by the codec of its gains (a column each), and the bytes of a message."""
    found: dict[tuple[Any, ...], dict[str, list[Line]]] = {}
    for line in {identity(line): line for line in lines_of("gains")}.values():
        rung = (line["task"], line["kind"], line["budget"], line["every"], line["codec"])
        found.setdefault(rung, {}).setdefault(line["small"], []).append(line)
    rows = []
    for (task, kind, budget, every, codec), tried in sorted(
        found.items(), key=lambda item: (item[0][0], -item[0][3], item[0][4])
    ):
        texts = [NAMES[task], model_name(kind, budget), str(every), CODECS[codec]]
        for small in GAINS:
            runs = sorted(tried.get(small, ()), key=lambda run: run["seed"])
            size = f"{runs[0]['bytes'] / (-(-runs[0]['steps'] // every)) / 1000:,.1f} kB: " if runs else ""
            texts.append(size + (mean([run["validation_loss"] for run in runs]) if runs else ""))
        rows.append(texts)
    return grid(("", "model", "every", "codec", *(f"gains: {CODECS.get(small, '16 bits')}" for small in GAINS)), rows)


def longer() -> str:
    """The shortest run of each rung whose mean loss is not above dense's, or the longest that was tried; by bytes."""
    found: dict[tuple[str, str, float | None, int, str], dict[int, list[Line]]] = {}
    for line in {identity(line): line for line in known()}.values():
        rung = (line["task"], line["kind"], line["budget"], line["every"], line["codec"])
        found.setdefault(rung, {}).setdefault(line["steps"], []).append(line)
    rows: list[tuple[int, float, list[str]]] = []
    for (task, kind, budget, every, codec), by_steps in found.items():
        dense = rungs(task)[DENSE]
        above = {steps: above_dense(runs, dense) for steps, runs in by_steps.items()}
        steps = shortest(above)
        runs = sorted(by_steps[steps], key=lambda run: run["seed"])
        run, length = runs[0], steps / TASKS[task]["steps"]
        setting = (NAMES[task], model_name(kind, budget), str(every), CODECS[codec], f"{steps:,}", f"{length:.1f}")
        fewer = (f"{dense[0][key] / run[key]:,.0f}" for key in ("bytes", "ring_bytes"))
        loss = (mean([run["validation_loss"] for run in runs]), f"{above[steps]:+.1%}")
        texts = [*setting, megabytes(run["bytes"]), *fewer, *loss, "yes" if above[steps] <= 0 else "no"]
        rows.append((list(NAMES).index(task), run["bytes"], texts))
    headings = ("", "model", "every", "codec", "steps", "times the steps", "MB handed over", "times fewer")
    return grid(
        (*headings, "fewer by bytes sent", "loss", "from dense", "reached"), [texts for *_, texts in sorted(rows)]
    )


def _over_run(values: Sequence[float]) -> str:
    """Text "mean (first quarter → last quarter)"."""
    quarter = max(1, len(values) // 4)
    ends = (statistics.mean(values[:quarter]), statistics.mean(values[-quarter:]))
    return f"{statistics.mean(values):.2f} ({ends[0]:.2f} → {ends[1]:.2f})"


def _tables() -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {
        "ladder-agreement": agreements,
        "ladder-gains": gains,
        "ladder-longer": longer,
        "ladder-gpt-128": partial(frontier, "gpt-128"),
    }
    for task in FRONTIERS:
        found |= {
            f"ladder-methods-{task}": lambda task=task: methods(task),
            f"ladder-{task}": lambda task=task: frontier(task),
            f"ladder-tuning-{task}": lambda task=task: tuning(task),
        }
    return found


TABLES = _tables()
