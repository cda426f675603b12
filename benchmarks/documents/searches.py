"""Tables of quality under further options: longer runs, larger models, weight decay, a teacher, pruning, found plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.documents.sizes import KINDS, MODELS, losses, mean_of, of_wider
from benchmarks.markdown import bold_least, difference, grid, mean, short
from benchmarks.quality import further_suites, searches
from benchmarks.quality.cells import LOW, RATES, SEEDS, at_best, identity, seeds_of
from benchmarks.quality.tasks import TASKS
from benchmarks.result_files import latest, lines_of

Line = dict[str, Any]
LONGER_NAMES = {
    "gpt": MODELS["gpt"],
    "gpt-python": "the same GPT, 4.7 MB of Python",
    "lstm": MODELS["lstm"],
}
SEARCHED = {**MODELS, "gpt-small": "GPT, 2 layers of width 64"}
LARGER_NAMES = {"gpt-large": "GPT, 8 layers of width 288", "lstm-large": "LSTM, 2 layers of width 440"}


def _measured(cells: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """Measured cells of a suite, each with its line."""
    known = {identity(line): line for line in lines_of("quality")}
    return ((one, known[identity(one)]) for one in cells if identity(one) in known)


def _columns(runs: list[Line]) -> list[str]:
    """Cells of a row: number of seeds, losses, and accuracies if the task has them."""
    accuracy = [100 * run["validation_accuracy"] for run in runs if "validation_accuracy" in run]
    return [str(len(runs)), losses(runs), *([mean(accuracy, ".2f")] if accuracy else [])]


_HEADINGS = ("seeds", "validation loss", "accuracy in %")


def _best_of(cells: Iterable[Line]) -> dict[tuple[str, float], list[Line]]:
    """(kind, budget) → runs at its best learning rate: the one with the most seeds; among equals, the least mean loss.

    A wider model's budget is a number of parameters.
    """
    by_rate: dict[tuple[str, float], dict[float, list[Line]]] = {}
    for one, line in _measured(cells):
        method = one["kind"], one["overrides"].get("share.budget", 0.1)
        by_rate.setdefault(method, {}).setdefault(one["overrides"]["optimizer.lr"], []).append(line)
    return {
        method: min(rates.values(), key=lambda runs: (-len(runs), mean_of(runs))) for method, rates in by_rate.items()
    }


def _sides(best: dict[tuple[str, float], list[Line]]) -> Iterator[list[str]]:
    """Cells of each kind and budget: name, parameters, losses, distance to dense with the same seeds, learning rate."""
    names = {**KINDS, "equal": "dense, as small as 10 %"}
    for (kind, budget), runs in best.items():
        dense = best.get(("dense", 0.1), [])
        alike = kind != "dense" and [run["seed"] for run in runs] == [run["seed"] for run in dense]
        apart = f"{mean_of(runs) / mean_of(dense) - 1:+.1%}" if alike else ""
        name = names[kind]
        if kind == "shared":
            name = f"{budget:.0%} bank" if budget < 1 else "bank as small as 10 %, wider model"
        yield [name, f"{runs[0]['parameters']:,}", losses(runs), apart, short(runs[0]["overrides"]["optimizer.lr"])]


def longer(task: str) -> str:
    """A row per kind and budget, each at its best learning rate: runs of the usual length, and four times as long."""
    lines, steps = lines_of("quality"), 4 * TASKS[task]["steps"]
    best = _best_of(one for one in further_suites.longer() if one["task"] == task)
    rows = []
    for (kind, budget), (name, size, *longer_run) in zip(best, _sides(best), strict=True):
        usual = f"{mean_of(at_best(lines, task, kind, budget)[1]):.3f}" if budget == 0.1 and task in RATES else ""
        if budget > 1 and (runs := of_wider(task)):
            usual = f"{mean_of(runs):.3f}"
        rows.append([name, size, usual, *longer_run])
    headings = (
        "parameters",
        f"{steps // 4:,} steps",
        f"{steps:,} steps",
        "from dense",
        "learning rate of the longer run",
    )
    return grid((LONGER_NAMES[task], *headings), rows)


def larger(task: str) -> str:
    """A row per kind of a model with ten times the weights, each at its best learning rate."""
    best = _best_of(one for one in further_suites.larger(SEEDS) if one["task"] == task)
    headings = ("parameters", "validation loss", "from dense", "best learning rate")
    return grid((LARGER_NAMES[task], *headings), list(_sides(best)))


def teacher(task: str) -> str:
    """A row per budget and teacher option, with the mean difference to no teacher, seed by seed, and its standard error."""
    found: dict[tuple[float, str], dict[int, Line]] = {}
    for one, line in _measured(one for one in further_suites.distill() if one["task"] == task):
        found.setdefault((one["overrides"]["share.budget"], one["way"]), {})[one["seed"]] = line
    rows = []
    for (budget, option), runs in found.items():
        alone = found[budget, "none"]
        apart = [runs[seed]["validation_loss"] - alone[seed]["validation_loss"] for seed in runs.keys() & alone.keys()]
        seeds, loss, *accuracy = _columns(list(runs.values()))
        shown = "" if option == "none" else difference(apart)
        rows.append([f"{budget:.0%} bank", option, seeds, loss, shown, *accuracy])
    headings = ("teacher", "seeds", "validation loss", "from no teacher", "accuracy in %")
    return grid((MODELS[task], *headings)[: len(rows[0])], rows)


def decays(task: str, budget: float) -> str:
    """A row per kind, a column per weight decay, at the kind's best learning rate under the usual decay. Bold: least mean loss."""
    usual = TASKS[task]["optimizer.weight_decay"]
    found: dict[str, dict[float, list[Line]]] = {}
    for one, line in _measured(one for one in further_suites.decay() if one["task"] == task):
        if one["overrides"].get("share.budget", 0.1) == budget:
            found.setdefault(one["kind"], {}).setdefault(one["overrides"]["optimizer.weight_decay"], []).append(line)
    shown = sorted((usual, *further_suites.DECAYS))
    rows = []
    for kind, by_decay in found.items():
        rate, at_usual = at_best(lines_of("quality"), task, kind, budget)
        columns = {usual: at_usual, **{value: runs for value, runs in by_decay.items() if len(runs) == len(at_usual)}}
        means = bold_least([mean_of(runs) for runs in columns.values()], "{:.3f}".format)
        texts = dict(zip(columns, means, strict=True))
        rows.append([KINDS[kind], short(rate), *(texts.get(value, "") for value in shown)])
    return grid((f"{MODELS[task]}, {budget:.0%}", "learning rate", *(f"decay {value:g}" for value in shown)), rows)


def pruned(task: str) -> str:
    """A row per pruning option, beside banks that are as small from the start."""
    found: dict[str, list[Line]] = {}
    for one, line in _measured(one for one in further_suites.prune() if one["task"] == task):
        found.setdefault(one["way"], []).append(line)
    rows = []
    for option, runs in found.items():
        sent, kept = runs[0]["parameters"], runs[0].get("kept_numbers")
        rows.append([option, f"{sent:,}", "" if kept is None else f"{kept:,}", *_columns(runs)])
    return grid((MODELS[task], "sent", "left after pruning", *_HEADINGS)[: len(rows[0])], rows)


def search(task: str) -> str:
    """Plain mappings and mappings that a search found, after full training, best first."""
    return grid(searches.HEADINGS, list(map(list, searches.rows(lines_of("searches"), task))))


def beside_controls() -> str:
    """Gain of the paper's search over the two controls, task by task: mean difference seed by seed, and its standard error."""
    known = latest(lines_of("searches"), searches.KEYS)
    rows = []
    for task in searches.TASKS:
        found = [known.get((task, "pretrain", seed)) for seed in seeds_of(task)]
        texts = []
        for control in ("random", "single"):
            pairs = zip(found, (known.get((task, control, seed)) for seed in seeds_of(task)), strict=True)
            apart = [one["validation_loss"] - other["validation_loss"] for one, other in pairs if one and other]
            texts.append(difference(apart) if apart else "")
        if all(texts):
            rows.append([SEARCHED[task], *texts])
    return grid(("loss of `pretrain`'s plan", "beside random groups", "beside one bank for everything"), rows)


def _of(name: str, function: Callable[[str], str], tasks: Iterable[str]) -> dict[str, Callable[[], str]]:
    return {f"{name}-{task}": lambda task=task: function(task) for task in tasks}


TABLES: dict[str, Callable[[], str]] = {
    **_of("longer", longer, LONGER_NAMES),
    **_of("larger", larger, LARGER_NAMES),
    **_of("decay", lambda task: decays(task, 0.1), further_suites.OPTION_TASKS),
    "decay-lstm-2": lambda: decays("lstm", LOW),
    **_of("teacher", teacher, further_suites.OPTION_TASKS),
    **_of("pruned", pruned, further_suites.OPTION_TASKS),
    **_of("search", search, searches.TASKS),
    "search-beside-controls": beside_controls,
}
