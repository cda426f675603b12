"""What the values of a recipe may be."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_ssn.baselines import CONTROLS
from dist_ssn.engines import ENGINES
from dist_ssn.errors import PlanError, unknown_choice
from dist_ssn.plan.mapping import check_mapping
from dist_ssn.plan.overlap import check_compress, parse_overlap
from dist_ssn.plan.rules import parse_morph
from dist_ssn.train.data import DATA
from dist_ssn.train.metrics.predicted import read_prediction, way_of
from dist_ssn.train.models import MODELS
from dist_ssn.train.optim import OPTIMIZERS, SCHEDULES
from dist_ssn.train.recipe.keys import key_kinds, raise_all, type_problems
from dist_ssn.train.recipe.schema import DENSE, ENGINE_OPTIONS, Recipe

# Values that are one of a few names.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.name": tuple(DATA),
    "optimizer.name": tuple(OPTIMIZERS),
    "schedule.name": tuple(SCHEDULES),
    "engine.name": tuple(ENGINES),
    "share.control": tuple(CONTROLS),
    "wandb.mode": ("disabled", "offline", "online"),
    "precision": ("fp32", "bf16"),
    "prune.what": ("bank", "weights"),
}


def validate(recipe: Recipe, world_size: int) -> None:
    """Checks every value of a recipe, for a run on `world_size` processes, and reports all problems at once.

    Raises:
        RecipeError: one sentence with each wrong key, its value, and what would be right.
    """
    problems = recipe_problems(recipe, world_size)
    raise_all([f"recipe {recipe.name!r}: {problem}" for problem in problems.values()])


def recipe_problems(recipe: Recipe, world_size: int) -> dict[str, str]:
    """Key → what is wrong with it, types first: a value of a wrong type is not looked at further."""
    values = {key: functools.reduce(getattr, key.split("."), recipe) for key in key_kinds()}
    problems = type_problems(values)
    for key, problem in _value_problems(values, world_size, wrong=set(problems)):
        problems.setdefault(key, f"{key} {problem}")
    return problems


Given = Callable[..., bool]
"""(keys) → whether all of them have a value of a right type"""
Problem = tuple[str, str]
"""a key, and what is wrong with it"""


def _value_problems(values: Mapping[str, Any], world_size: int, wrong: set[str]) -> Iterator[Problem]:
    def given(*keys: str) -> bool:
        return all(key not in wrong and values[key] is not None for key in keys)

    yield from _range_problems(values, given)
    yield from _engine_problems(values, given)
    yield from _name_problems(values, given)
    yield from _schedule_problems(values, given)
    yield from _share_problems(values, given)
    if given("predicted"):
        yield from _prediction_problems(values)
    if given("share.control"):
        yield from _control_problems(values)
    yield from _distill_problems(values, given)
    if given("steps", *(f"prune.{name}" for name in ("final", "what", "begin", "every"))) and values["prune.final"]:
        yield from _prune_problems(values)
    if given("batch_size", "accumulation") and min(values["batch_size"], values["accumulation"]) > 0:
        parts = world_size * values["accumulation"]
        if values["batch_size"] % parts:
            yield (
                "batch_size",
                f"must be divisible by processes × accumulation = {world_size} × {values['accumulation']} = {parts}, "
                f"got {values['batch_size']}; the next one is {parts * math.ceil(values['batch_size'] / parts)}",
            )


def _range_problems(values: Mapping[str, Any], given: Given) -> Iterator[Problem]:
    """Numbers out of their range, and names that nobody knows."""
    for key in (
        *("steps", "batch_size", "accumulation", "evaluate_every", "evaluate_batches", "patience", "threads"),
        *("data.limit", "prune.every", "checkpoint.every", "checkpoint.keep", "engine.compare_every"),
    ):
        if given(key) and values[key] < 1:
            yield key, f"must be at least 1, got {values[key]}"
    for key in ("seed", "share.seed", "data.fold", "schedule.warmup", "prune.begin"):
        if given(key) and values[key] < 0:
            yield key, f"must be 0 or more, got {values[key]}"
    for key, low, high, rule in (
        ("optimizer.lr", math.ulp(0), math.inf, "a number above 0"),
        ("clip_norm", math.ulp(0), math.inf, "a number above 0, or null for no clipping"),
        ("optimizer.weight_decay", 0, math.inf, "0 or more"),
        ("optimizer.momentum", 0, 1, "at least 0 and below 1"),
        ("schedule.final", 0, math.nextafter(1, 2), "between 0 and 1"),
        ("schedule.gamma", math.ulp(0), math.nextafter(1, 2), "above 0 and at most 1"),
        ("checkpoint.every_seconds", math.ulp(0), math.inf, "a number of seconds above 0, or null"),
        ("engine.timeout_seconds", math.ulp(0), 1e9, "a number of seconds above 0"),
        ("data.validation", math.ulp(0), 1, "above 0 and below 1"),
        ("prune.final", 0, 1, "at least 0 and below 1"),
        ("distill.weight", 0, math.nextafter(1, 2), "between 0 and 1"),
        ("distill.temperature", math.ulp(0), math.inf, "a number above 0"),
        ("distill.hidden_weight", 0, math.inf, "0 or more"),
    ):
        if given(key) and not low <= values[key] < high:  # nan and inf fail too
            yield key, f"must be {rule}, got {values[key]}"
    if given("optimizer.betas") and not all(0 <= beta < 1 for beta in values["optimizer.betas"]):
        yield "optimizer.betas", f"must be two numbers, at least 0 and below 1, got {list(values['optimizer.betas'])}"
    for key, known in CHOICES.items():
        if given(key) and values[key] not in known:
            yield key, f"is an {unknown_choice('name', values[key], known)}"


def _engine_problems(values: Mapping[str, Any], given: Given) -> Iterator[Problem]:
    """What does not go with the engine."""
    if given("engine.name") and values["engine.name"] in ENGINE_OPTIONS:
        for option in {name for names in ENGINE_OPTIONS.values() for name in names} - {
            *ENGINE_OPTIONS[values["engine.name"]]
        }:
            key = f"engine.{option}"
            if given(key) and values[key] not in (False, "none"):
                owners = " or ".join(name for name, options in ENGINE_OPTIONS.items() if option in options)
                yield key, f"goes with the engine {owners}, not with {values['engine.name']}"
    if given("engine.overlap"):
        try:
            parse_overlap(values["engine.overlap"])
        except PlanError as error:
            yield "engine.overlap", f"is wrong: {error}"
        else:
            if given("engine.compress"):
                try:
                    check_compress(values["engine.compress"], parse_overlap(values["engine.overlap"]))
                except PlanError as error:
                    yield "engine.compress", f"is wrong: {error}"
    if given("engine.stage") and values["engine.stage"] not in range(4):
        yield "engine.stage", f"must be 0, 1, 2 or 3, got {values['engine.stage']}"
    if given("engine.config") and not Path(values["engine.config"]).is_file():
        yield "engine.config", f"must be DeepSpeed's JSON file, but {values['engine.config']!r} does not exist"


def _name_problems(values: Mapping[str, Any], given: Given) -> Iterator[Problem]:
    """Names of the run, its folder and its model; the model's arguments."""
    for key in ("name", "output", "model"):
        if given(key) and not values[key].strip():
            yield key, "must not be empty"
    if given("name") and (Path(values["name"]).name != values["name"] or values["name"] == ".."):
        yield "name", f"must be a plain name, for it names the run's folder, got {values['name']!r}"
    if given("output") and Path(values["output"]).exists() and not Path(values["output"]).is_dir():
        yield "output", f"must be a folder, but {values['output']!r} is a file"
    if given("model") and values["model"] not in MODELS and "." not in values["model"]:
        known = unknown_choice("name", values["model"], MODELS)
        yield "model", f"is an {known}; a model of your own is an import path such as my_module.build"
    if given("model_args") and not _is_json(values["model_args"]):
        yield "model_args", "must hold only text, numbers, true, false, null, lists and dicts of them"


def _schedule_problems(values: Mapping[str, Any], given: Given) -> Iterator[Problem]:
    """What does not go with the number of steps."""
    if given("steps", "schedule.warmup") and values["schedule.warmup"] > values["steps"] > 0:
        yield "schedule.warmup", f"must be at most the {values['steps']} steps, got {values['schedule.warmup']}"
    milestones = values["schedule.milestones"] if given("schedule.milestones") else ()
    if list(milestones) != sorted(set(milestones)) or any(milestone < 1 for milestone in milestones):
        yield "schedule.milestones", f"must be rising step numbers, got {list(milestones)}"
    if given("schedule.name", "schedule.milestones") and values["schedule.name"] == "step" and not milestones:
        yield "schedule.milestones", "must name at least one step, for schedule.name is step"


def _distill_problems(values: Mapping[str, Any], given: Given) -> Iterator[Problem]:
    """What is wrong with the teacher."""
    teacher = values["distill.teacher"]
    if given("distill.teacher") and teacher != DENSE and not (Path(teacher) / "recipe.json").is_file():
        files = "where its recipe.json and checkpoints are"
        yield "distill.teacher", f"must be {DENSE} or the folder of a run, {files}, but is {teacher!r}"
    if given("distill.hidden") and values["distill.hidden"] and teacher is None:
        yield "distill.hidden", "needs a teacher: set distill.teacher too"


def _share_problems(values: Mapping[str, Any], given: Given) -> Iterator[Problem]:
    """What is wrong with how weights are shared, also in a recipe that shares none: it may be the twin of one that does."""
    if given("share.plan") and not Path(values["share.plan"]).is_file():
        yield "share.plan", f"must be a plan's JSON file, but {values['share.plan']!r} does not exist"
    checks: dict[str, Callable[[Any], object]] = {"share.mapping": check_mapping, "share.morph": parse_morph}
    for key, check in checks.items():
        if given(key) and values[key] != "auto":
            try:
                check(values[key])
            except PlanError as error:
                yield key, f"is wrong: {error}"


def _prediction_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the file that says what to expect."""
    if values["engine.name"] not in ("ddp", "mpi"):
        yield "predicted", f"goes with the engine ddp or mpi, not with {values['engine.name']}"
    way = way_of(values["share.budget"], values["share.mapping"], values["engine.overlap"])
    try:
        read_prediction(Path(values["predicted"]), way)
    except (OSError, ValueError) as error:
        yield (
            "predicted",
            f"must be what dist-ssn plan --cluster … --json printed, but {values['predicted']}: {error}",
        )


def _prune_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not go with pruning."""
    begin, steps = values["prune.begin"], values["steps"]
    end = steps if values["prune.end"] is None else values["prune.end"]
    if not begin <= end <= steps:
        yield "prune.end", f"must lie between prune.begin = {begin} and steps = {steps}, got {end}"
    if values["engine.name"] not in ("ddp", "mpi"):
        yield (
            "prune.final",
            f"goes with the engine ddp or mpi, whose processes hold all numbers, not with {values['engine.name']}",
        )
    shared = values["share.budget"] is not None or values["share.plan"] is not None
    if values["prune.what"] == "bank" and (not shared or values["share.control"] is not None):
        yield "prune.what", "is bank, and this model has none: set share.budget, or prune its weights"
    if values["prune.what"] == "weights" and values["share.control"] is not None:
        yield (
            "prune.what",
            f"is weights, which the control {values['share.control']} makes in its own way: leave one of them out",
        )


def _control_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not go with a control, which has no banks."""
    control = values["share.control"]
    if values["share.budget"] is None:
        yield "share.control", f"is {control}, which needs a budget: set share.budget too, such as --share.budget=10%"
    for key, unset in (("share.plan", None), ("share.mapping", "auto"), ("share.morph", "auto")):
        if values[key] != unset:
            shown = "null" if unset is None else unset
            yield key, f"is for shared weights, and share.control {control} has no banks: leave one of them {shown}"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
