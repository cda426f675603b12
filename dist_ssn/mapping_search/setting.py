"""The setting of a search: its job, the model's weights, the wanted plan, and the options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from dist_ssn.engines import World
from dist_ssn.errors import RecipeError, unknown_choice
from dist_ssn.mapping_search.short import Job
from dist_ssn.model.specs import Specs
from dist_ssn.plan import Plan, make_plan
from dist_ssn.plan.budget import Budget

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Options of a search.

    Args:
        groups: number of groups; None: chosen by silhouette (random: 4; network: the cheapest number).
        short_steps: steps of the short run of pretrain and gradients; None: 100 and 24.
        templates: K of pretrain and gradients: number of coefficients that describe a layer.
        split: the budget is split between groups in proportion to their "size", or also to their weights' "sensitivity".
        cluster: file or name of a cluster (network).
        max_steps: sum of the steps of an auto search; None: as many as its longest trial may have.
        max_seconds: duration of an auto search, instead of max_steps.
        trials: JSON-lines file of the trials, from which a killed auto search resumes; None: beside the output.
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
    """The options, checked.

    Raises:
        RecipeError: an option is unknown or has an impossible value.
    """
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
class Wanted:
    """The plan that a search is for.

    Args:
        budget: see `make_plan`.
        mapping: of the method manual; the others find one.
        morph: see `make_plan`.
        seed: see `make_plan`.
    """

    budget: Budget
    mapping: str | Mapping[str, str] = "auto"
    morph: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """Input of a method; it calls `go_on` before each step, and stops when that is False (a budget of seconds is spent)."""

    job: Job
    world: World
    specs: Specs
    wanted: Wanted
    options: Options
    go_on: Callable[[], bool] = lambda: True
    demand: Mapping[str, float] | None = None
    """Weight name → sensitivity, where the budget is split by it."""

    def plan(self, mapping: str | Mapping[str, str], morph: str | None = None) -> Plan:
        """The plan of a mapping at the wanted budget."""
        wanted = self.wanted
        how = {"morph": morph or wanted.morph, "seed": wanted.seed, "demand": self.demand}
        return make_plan(self.specs, wanted.budget, mapping=mapping, **how)

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]


@dataclass(frozen=True)
class Found:
    """Result of a method.

    Args:
        mapping: weight → group.
        note: the method's choices in words.
        steps: training steps that it took.
    """

    mapping: dict[str, str]
    note: str
    steps: int = 0
