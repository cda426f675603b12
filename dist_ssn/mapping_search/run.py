"""A search: its checks and its plan, from a setting (`find_plan`) or from a recipe (`run`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_ssn.engines import init_world
from dist_ssn.errors import RecipeError, UserError, unknown_choice
from dist_ssn.files import write_whole
from dist_ssn.mapping_search.auto import auto
from dist_ssn.mapping_search.methods import METHODS, sensitivity
from dist_ssn.mapping_search.recipe_job import RecipeJob
from dist_ssn.mapping_search.setting import Setting, Wanted, read_options
from dist_ssn.mapping_search.trials import Line, Trials
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import Plan
from dist_ssn.train.ranks.threads import processor_threads
from dist_ssn.train.recipe.check import validate
from dist_ssn.train.recipe.schema import Recipe

AUTO = "auto"


def find_plan(setting: Setting, method: str, report: Callable[[Line], None], trials: Trials | None = None) -> Plan:
    """The plan that a method finds, the same on every rank.

    Args:
        setting: job, weights and options.
        method: a key of METHODS, or "auto".
        report: called on rank 0 with each trial of auto, and at the end with {"kind": "found", "note": …}.
        trials: of an earlier, killed search; None: none.
    """
    report = report if setting.world.rank == 0 else lambda _: None
    if setting.options.split == "sensitivity":
        setting = dataclasses.replace(setting, demand=setting.agree(sensitivity(setting)))
    if method == AUTO:
        trials = trials or Trials(None, "")
        trials.lines = setting.agree(trials.lines)
        plan, note = auto(setting, trials, report)
    else:
        found = METHODS[method](setting)
        plan, note = setting.plan(found.mapping), f"{method}: {found.note}"
    # Another kind of processor rounds differently, so ranks could cluster differently: all ranks use rank 0's plan.
    plan = Plan.from_json(setting.agree(plan.to_json()))
    report({"kind": "found", "note": note})
    return plan


def run(
    recipe: Recipe,
    method: str,
    output: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
    report: Callable[[Line], None] = lambda _: None,
) -> Plan:
    """Does what `dist_ssn.mapping_search.search_recipe` documents.

    Args:
        recipe: as there.
        method: as there.
        output: as there.
        options: as there.
        report: see `find_plan`.
    """
    chosen = read_options(options)
    check_search(recipe, method, output)
    check_options(method, options)
    with init_world() as world, processor_threads(recipe.threads):
        validate(recipe, world.world_size)
        share = recipe.share
        assert share.budget is not None
        wanted = Wanted(share.budget, share.mapping, share.morph, share.seed)
        setting = Setting(RecipeJob(recipe, world), world, _specs(recipe), wanted, chosen)
        path = chosen.trials or (None if output is None else Path(output).with_suffix(".trials.jsonl"))
        key = _key(recipe, chosen.short_steps, chosen.templates, chosen.split)
        trials = Trials(path, key, writes=world.rank == 0) if method == AUTO else None
        plan = find_plan(setting, method, report, trials)
        if output is not None and world.rank == 0:
            write_whole(Path(output), plan.to_json() + "\n")
        return plan


def check_search(recipe: Recipe, method: str, output: str | os.PathLike[str] | None) -> None:
    """Checks a search before anything is built.

    Raises:
        UserError: an unknown method, a recipe that is dense or that already has a plan or mapping, a folder that does not exist.
    """
    share = recipe.share
    check_method(method, [*METHODS, AUTO])
    if share.plan is not None:
        raise RecipeError(f"share.plan is {share.plan}, and a search finds a plan: set share.plan to null")
    if share.keep:
        raise RecipeError(
            "share.keep is true, and a search is for weights that are trained from scratch: set it to false"
        )
    if share.control is not None:
        raise RecipeError(f"share.control is {share.control}, which has no plan to search for: set it to null")
    if share.budget is None:
        raise RecipeError(
            "share.budget is null, which leaves the model dense, with nothing to search for: give one, such as --share.budget=10%"
        )
    if share.mapping != "auto" and method != "manual":
        raise RecipeError(
            f"share.mapping is {share.mapping!r:.60}, and the method {method} finds a mapping: leave it auto, or use "
            "the method manual"
        )
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UserError(f"search: the folder of the output {output} does not exist: make it first")


def check_method(method: str, known: Iterable[str]) -> None:
    """Checks a method's name.

    Raises:
        UserError: the name is none of `known`.
    """
    if method not in (known := list(known)):
        raise UserError(unknown_choice("method of search", method, known))


_OF_METHODS: dict[str, tuple[str, ...]] = {
    "groups": ("weights-free", "pretrain", "gradients", "network", "random"),
    "short_steps": ("pretrain", "gradients", AUTO),
    "templates": ("pretrain", "gradients", AUTO),
    "split": (*METHODS, AUTO),
    "cluster": ("network",),
    "max_steps": (AUTO,),
    "max_seconds": (AUTO,),
    "trials": (AUTO,),
}
"""Option → the methods that use it."""


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Checks that the method uses each given option.

    Raises:
        RecipeError: the method would ignore an option.
    """
    for name, value in options.items():
        if value is not None and method not in _OF_METHODS[name]:
            raise RecipeError(
                f"search: {name} goes with the method {' or '.join(_OF_METHODS[name])}, not with {method}"
            )


def _specs(recipe: Recipe) -> Any:
    """The weights of the recipe's model, as `train` finds them."""
    from dist_ssn.train.data import data_hints
    from dist_ssn.train.models import build_model

    hints = data_hints(recipe.data, context=recipe.model_args.get("context"))
    torch.manual_seed(recipe.seed)
    return find_specs(build_model(recipe.model, recipe.model_args, hints), recipe.share.include, recipe.share.exclude)


def _key(recipe: Recipe, *options: Any) -> str:
    """Hash of everything that trials depend on: the recipe without the run's name, its output and its trackers."""
    settings = json.loads(recipe.to_json())
    for name in ("name", "output", "wandb", "checkpoint", "engine", "threads"):
        del settings[name]
    return hashlib.sha256(json.dumps([settings, *options], sort_keys=True).encode()).hexdigest()[:16]
