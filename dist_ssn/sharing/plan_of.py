"""The plan in a state dict: `plan_of`, and what older state dicts have nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_ssn.errors import PlanError
from dist_ssn.plan import Plan
from dist_ssn.plan.scales import Scales

ATTRIBUTE = "dist_ssn"
"""Name of the bank set in the module that owns it."""
_STATE = "_extra_state"
_ROUNDING = 0.25
"""Largest distance of an averaged byte from an integer."""


def plan_of(state_dict: Mapping[str, Any]) -> Plan:
    """The plan of the shared model that a state dict was taken from, for `share(model, plan=…)`.

    Args:
        state_dict: of a shared model, wrapped or not, so that its keys may have any prefix, such as "module.".

    Raises:
        PlanError: there is no plan in it, or there are several.
    """
    if not isinstance(state_dict, Mapping):
        raise PlanError(f"plan_of() needs a state dict, not an object of type {type(state_dict).__name__}")
    ending = f"{ATTRIBUTE}.{_STATE}"
    keys = [key for key in state_dict if isinstance(key, str) and (key == ending or key.endswith(f".{ending}"))]
    if not keys:
        nested = [key for key, value in state_dict.items() if isinstance(value, Mapping) and _has_plan(value, ending)]
        remedy = f"give its entry {nested[0]!r}" if nested else "give the whole state_dict() of a shared model"
        raise PlanError(f"the state dict has no plan, because no key ends with {ending!r}: {remedy}")
    plans = [plan_in(state_dict[key]) for key in keys]
    if any(plan != plans[0] for plan in plans):
        raise PlanError(
            f"the state dict has {len(plans)} different plans ({', '.join(keys[:3])}), because parts were shared separately: give "
            "the entries of one part"
        )
    return plans[0]


def _has_plan(state_dict: Mapping[Any, Any], ending: str) -> bool:
    return any(isinstance(key, str) and key.endswith(ending) for key in state_dict)


def plan_in(state: Any) -> Plan:
    """The plan in a bank set's extra state.

    Args:
        state: the plan's bytes [n]: uint8 as older versions wrote them, or floating-point numbers, which may have been averaged.

    Raises:
        PlanError: there is no plan in it, or it was computed from several plans.
    """
    if not isinstance(state, Tensor) or state.ndim != 1:
        raise PlanError("the state dict has no plan: it was not written by dist_ssn")
    values = state.detach().cpu().double()
    whole = values.round()
    if not ((values - whole).abs() <= _ROUNDING).all() or not ((whole >= 0) & (whole <= 255)).all():
        raise PlanError(
            "the plan in the state dict is no text: the entry was computed from models of different plans, or by a sum instead of "
            "a mean; average only models that were built with the same share(model, plan=…)"
        )
    return Plan.from_json(bytes(whole.to(torch.uint8).tolist()).decode(errors="replace"))


def recorded_scales(state_dict: Mapping[str, Any], prefix: str) -> Scales | None:
    """The scales of a bank, of a state dict that has them in its plan, as version 0.1.0 wrote it; None if they aren't there.

    Args:
        state_dict: of a shared model.
        prefix: of the bank's keys.
    """
    banks, _, name = prefix.removesuffix(".").rpartition(".")
    state = state_dict.get(f"{banks}.{_STATE}")
    plan = None if state is None else plan_in(state)
    return None if plan is None or plan.scales is None else plan.scales.get(name)
