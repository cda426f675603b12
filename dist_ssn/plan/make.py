"""`make_plan`: from specs, budget, mapping and morph to a `Plan`. Pure, and the same on every rank, machine and run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from dist_ssn.errors import BudgetError, PlanError
from dist_ssn.model.selectors import Selector
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan.allocate import Demand, Infeasible, allocate, least
from dist_ssn.plan.budget import Budget, resolve_budget
from dist_ssn.plan.mapping import Groups, map_weights
from dist_ssn.plan.plan import Plan
from dist_ssn.plan.rules import Morph, parse_morph
from dist_ssn.plan.slots import LARGEST, Group

HIGH_BUDGET = 1.0
"""From this fraction on, "auto" mixes several templates into a weight; below, it reads one, in many passes over the bank."""
LOW_BUDGET = 0.02
"""Below this fraction of the weights, "auto" makes no banks for layers that a model has once: they would be too small."""


def make_plan(
    specs: Specs | nn.Module,
    budget: Budget,
    *,
    mapping: str | Mapping[str, str] = "auto",
    morph: str | Morph = "auto",
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    seed: int = 0,
    keep: bool = False,
    demand: Mapping[str, float] | None = None,
) -> Plan:
    """Assigns each weight to a bank and chooses its morph, without changing the model.

    Args:
        specs: the result of `find_specs`, or the model itself.
        budget: largest number of trainable parameters that replace the weights: 0.1, "10%", 5_000_000, "5M", "5MB",
            "5MB/step".
        mapping: "auto", a key of `MAPPINGS` ("depth:3" with a number of groups), or {glob: group name}.
        morph: "auto", a name, a pair "down/up", with options as "offset:rank=4", or a `Morph`.
        include: if given, only these names, globs or classes of modules are shared (with a model only). A full name also shares a
            weight whose initial values were not drawn at random, ["*", "block.A_log"].
        exclude: these are not shared (with a model only).
        seed: of everything pseudo-random in the plan and in the bank's initial values.
        keep: the banks generate differences from the weights' values, which are kept (see `share`).
        demand: weight → importance of each of its elements in the split of the budget, relative to other weights, above 0;
            None: all equal.

    Raises:
        ShareError: the model has nothing to share.
        BudgetError: the budget cannot be read, or is too small; the message gives the smallest possible one.
        PlanError: unknown mapping or morph, no weights, or a demand that does not name each weight once.
    """
    if isinstance(specs, nn.Module):
        specs = find_specs(specs, include, exclude, structure=not keep, frozen=keep)
    elif not isinstance(specs, Specs):
        raise PlanError(
            f"cannot plan for an object of type {type(specs).__name__}: give a model, or the result of find_specs()"
        )
    elif include is not None or exclude is not None:
        raise PlanError(
            "include and exclude select among a model's weights: give the model, or give them to find_specs()"
        )
    if not specs.weights:
        raise PlanError("there are no weights to plan for: give a model, or the result of find_specs()")
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) > LARGEST:
        raise PlanError(f"seed {seed!r:.60} must be an integer of at most 53 bits")
    morph = parse_morph(morph)
    allowed = resolve_budget(budget, specs)
    banks = _allocate(specs, allowed, mapping, morph, seed, demand=_whole(demand, specs))
    if banks is None:
        raise BudgetError(
            f"budget {budget!r} allows {allowed:,} trainable parameters, too few for {len(specs.weights)} weights with mapping "
            f"{mapping!r:.60} and morph {morph.name!r}: {_smallest(specs, allowed, mapping, morph, seed)}"
        )
    return Plan(banks, allowed, seed, keep)


def _resolve(
    specs: Specs, allowed: int, mapping: str | Mapping[str, str], morph: Morph, seed: int
) -> tuple[Groups, Morph]:
    """The groups and the morph, with "auto" replaced by its choice at this budget."""
    if mapping == "auto":
        mapping = "blocks" if allowed >= math.floor(LOW_BUDGET * specs.numel) else "scale"
    if morph.name == "auto":
        # One bank read in many ways below the model's own size; a mixture of templates above (measured: docs/results/quality.md).
        morph = replace(morph, name="wavg" if allowed >= HIGH_BUDGET * specs.numel else "offset")
    return map_weights(specs.weights, mapping, seed), morph


def _whole(demand: Mapping[str, float] | None, specs: Specs) -> Demand | None:
    """The demand in units of 1/1000 of the smallest, as integers, so that its arithmetic is the same on every machine."""
    if demand is None:
        return None
    names = {weight.name for weight in specs.weights}
    if demand.keys() != names:
        raise PlanError(
            f"demand must name each weight once; {sorted(demand.keys() ^ names)[0]!r} is only in one of them"
        )
    if bad := [name for name, value in demand.items() if not 0 < value < math.inf]:
        raise PlanError(f"the demand of {bad[0]} is {demand[bad[0]]}: it must be a number above 0")
    least_of_all = min(demand.values())
    return {name: min(LARGEST, round(1000 * value / least_of_all)) for name, value in demand.items()}


def _allocate(
    specs: Specs,
    allowed: int,
    mapping: str | Mapping[str, str],
    morph: Morph,
    seed: int,
    demand: Demand | None = None,
) -> tuple[Group, ...] | None:
    """The banks for a budget; None if it is too small."""
    groups, morph = _resolve(specs, allowed, mapping, morph, seed)
    try:
        return allocate(groups, allowed, morph, demand)
    except Infeasible:
        return None


def _smallest(specs: Specs, low: int, mapping: str | Mapping[str, str], morph: Morph, seed: int) -> str:
    """A message with the smallest feasible budget above the infeasible `low`."""
    high = max(least(*_resolve(specs, low, mapping, morph, seed)), low + 1)
    while _allocate(specs, high, mapping, morph, seed) is None:
        low, high = high, 2 * high
        if high > LARGEST:
            return "no budget is enough for them"
    probe = high - 1  # rarely feasible
    while high - low > 1:
        low, high = (low, probe) if _allocate(specs, probe, mapping, morph, seed) is not None else (probe, high)
        probe = (low + high) // 2
    return f"the smallest possible budget is {high:,}"
