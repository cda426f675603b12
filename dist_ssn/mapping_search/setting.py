"""What a search starts from: the recipe, the model's weights, and the options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from dist_ssn.engines import World
from dist_ssn.errors import RecipeError, unknown_choice
from dist_ssn.model.specs import Specs
from dist_ssn.plan import Plan, make_plan
from dist_ssn.train.recipe.schema import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Choices of a search.

    Args:
        groups: number of groups; None: chosen by silhouette (random: 4, network: whatever is cheapest)
        short_steps: of the short run of pretrain (100) and gradients (24); None: those
        templates: K of pretrain and gradients: how many numbers describe a layer
        split: the budget between groups in proportion to their "size", or to their weights' "sensitivity" as well
        cluster: file or name of a cluster (network)
        max_steps: all steps of an auto search together; None: as many as the recipe's run has
        max_seconds: instead of max_steps
        trials: JSON-lines file of what was tried, from which a killed auto search goes on; None: beside the output
    """

    groups: int | None = None
    short_steps: int | None = None
    templates: int = 8
    split: str = "size"
    cluster: str | None = None
    max_steps: int | None = None
    max_seconds: float | None = None
    trials: str | None = None


SPLITS = ("size", "sensitivity")
LEAST = {"groups": 1, "short_steps": 1, "templates": 2, "max_steps": 1, "max_seconds": 0}


def read_options(given: Mapping[str, Any]) -> Options:
    """The options, checked. Raises: RecipeError, with what is wrong in one sentence."""
    known = {field.name for field in dataclasses.fields(Options)}
    for name, value in given.items():
        if name not in known:
            raise RecipeError(unknown_choice("option of search", name, known))
        if name in LEAST and value is not None:
            number = (int, float) if name == "max_seconds" else (int,)
            if not isinstance(value, number) or isinstance(value, bool) or not value >= LEAST[name]:
                raise RecipeError(f"search: {name} must be a number of at least {LEAST[name]}, got {value!r}")
    options = Options(**given)
    if options.split not in SPLITS:
        raise RecipeError(f"search: {unknown_choice('split', options.split, SPLITS)}")
    if options.max_steps is not None and options.max_seconds is not None:
        raise RecipeError("search: max_steps and max_seconds are two budgets: give one of them")
    return options


class OutOfTime(Exception):
    """The budget of seconds is spent; auto.py catches it."""


@dataclass(frozen=True)
class Setting:
    """What a method is given; `go_on`, asked before each step, is False when a budget of seconds is spent."""

    recipe: Recipe
    world: World
    specs: Specs
    options: Options
    go_on: Callable[[], bool] = lambda: True
    demand: Mapping[str, float] | None = None
    """Of each weight, where the budget is split by it."""

    def plan(self, mapping: str | Mapping[str, str], morph: str | None = None) -> Plan:
        """The plan at the recipe's budget."""
        share = self.recipe.share
        assert share.budget is not None
        how = {"morph": morph or share.morph, "seed": share.seed, "demand": self.demand}
        return make_plan(self.specs, share.budget, mapping=mapping, **how)

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]


@dataclass(frozen=True)
class Found:
    """What a method found: weight → group, the choices that it made in words, and the training steps that it took."""

    mapping: dict[str, str]
    note: str
    steps: int = 0
