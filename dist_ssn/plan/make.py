"""`make_plan`: specs + budget + mapping + morph → `Plan`. Pure, and the same on every rank, machine and run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..budget import Budget, resolve_budget
from ..errors import BudgetError
from ..specs import LayerSpec, Selector, Specs, find_specs
from .allocate import Infeasible, allocate
from .mapping import map_weights
from .rules import Morph, parse_morph
from .types import Group, Plan

HIGH_BUDGET = 1.0
"""From this fraction on, "auto" mixes templates of one shape instead of reading one bank many times."""


def make_plan(
    specs: Specs | nn.Module,
    budget: Budget,
    *,
    mapping: str | Mapping[str, str] = "auto",
    morph: str | Morph = "auto",
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    seed: int = 0,
) -> Plan:
    """Decides, without touching the model, which weights share which bank and how each is generated.

    Args:
        specs: what `find_specs` returned, or the model itself.
        budget: trainable numbers that may stand for all the weights: 0.1, "10%", 5_000_000, "5M", "5MB", "5MB/step".
        mapping: "auto", a key of `MAPPINGS` ("depth:3" with a number of groups), or {glob: group name}.
        morph: "auto", a name, a pair "down/up", with options as "offset:rank=4", or a `Morph`.
        include: if given, only these names, globs or classes of modules are shared (with a model only).
        exclude: these are not shared (with a model only).
        seed: of all that is pseudo-random in the plan and in the bank's initial values.

    Raises:
        ShareError: the model has nothing to share.
        BudgetError: the budget cannot be read, or is too small: the message says the smallest possible one.
        PlanError: unknown mapping or morph.
    """
    if isinstance(specs, nn.Module):
        specs = find_specs(specs, include, exclude)
    allowed = resolve_budget(budget, specs)
    chosen = parse_morph(morph)
    fraction = allowed / specs.numel
    if mapping == "auto":
        mapping = "shape" if fraction >= HIGH_BUDGET else "scale"
    if chosen.name == "auto":
        # One bank read in many ways below the model's own size; a mixture of templates above (measured: docs/quality.md).
        name = "wavg" if fraction >= HIGH_BUDGET else "offset"
        chosen = Morph(name, chosen.templates, chosen.chunk, chosen.gains, chosen.rank)
    groups = map_weights(specs.weights, mapping, seed)
    banks = _try(groups, allowed, chosen)
    if banks is None:
        least = _smallest(groups, allowed, specs.numel, chosen)
        raise BudgetError(
            f"budget {budget!r} allows {allowed:,} trainable numbers, too few for {len(specs.weights)} weights in "
            f"{len(groups)} bank(s) with morph {chosen.name!r}: the smallest possible budget is {least:,}"
        )
    return Plan(banks, allowed, seed)


def _try(groups: dict[str, list[LayerSpec]], budget: int, morph: Morph) -> tuple[Group, ...] | None:
    try:
        return allocate(groups, budget, morph)
    except Infeasible:
        return None


def _smallest(groups: dict[str, list[LayerSpec]], low: int, high: int, morph: Morph) -> int:
    """The least feasible budget above the infeasible `low`, by doubling and bisection."""
    high = max(high, low + 1)
    while _try(groups, high, morph) is None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _try(groups, middle, morph) is not None else (middle, high)
    return high
