"""Comparison of a plan with another plan, and with a model; differences in words."""

from __future__ import annotations

from dist_ssn.errors import PlanError
from dist_ssn.model.specs import Specs
from dist_ssn.plan.plan import Plan
from dist_ssn.plan.slots import Slot


def plan_difference(mine: Plan, other: Plan) -> str | None:
    """The first difference between two plans in words; None if they are equal."""
    if mine == other:
        return None
    if mine.keep != other.keep:
        return f"it {'has' if other.keep else 'has no'} weights that are kept, the model {'has' if mine.keep else 'has none'}"
    banks, theirs = ({group.name: group for group in plan.groups} for plan in (mine, other))
    if set(banks) != set(theirs):
        return f"it has banks {', '.join(theirs)}, the model has {', '.join(banks)}"
    for name, group in banks.items():
        if group.size != theirs[name].size:
            return f"its bank {name!r} has {theirs[name].size} parameters, the model's has {group.size}"
    slots, their_slots = ({slot.name: (group.name, slot) for group, slot in plan.slots()} for plan in (mine, other))
    for name in sorted(set(slots) ^ set(their_slots)):
        return f"weight {name!r} is shared only in {'the model' if name in slots else 'it'}"
    for name, (bank, slot) in slots.items():
        their_bank, their_slot = their_slots[name]
        if bank != their_bank:
            return f"its weight {name!r} reads bank {their_bank!r}, the model's reads {bank!r}"
        for field in Slot.__dataclass_fields__:
            if getattr(slot, field) != getattr(their_slot, field):
                return f"{field} of its weight {name!r} is {getattr(their_slot, field)!r}, the model's {getattr(slot, field)!r}"
    return f"budget or seed differ ({other.budget}, {other.seed}; the model has {mine.budget}, {mine.seed})"


def require_plan_fits(plan: Plan, specs: Specs) -> None:
    """Checks that a plan belongs to the model with these specs.

    Raises:
        PlanError: it does not; the message names up to five weights that differ.
    """
    weights = {weight.name: weight for weight in specs.weights}
    ties = {name: weight.name for weight in specs.weights for name in weight.aliases}
    reasons = dict(specs.left_out)
    problems = []
    for _, slot in plan.slots():
        weight = weights.get(slot.name)
        if slot.name in ties:
            problems.append(f"{slot.name} is tied to {ties[slot.name]} in the model")
        elif weight is None:
            problems.append(f"{slot.name} cannot be shared in the model ({reasons.get(slot.name, 'not a weight')})")
        elif weight.shape != slot.shape:
            problems.append(f"{slot.name} is {list(slot.shape)} in the plan and {list(weight.shape)} in the model")
        elif set(weight.aliases) != set(slot.aliases):
            differ = ", ".join(sorted(set(weight.aliases) ^ set(slot.aliases)))
            problems.append(f"{slot.name} is tied to {differ} only in {'the model' if weight.aliases else 'the plan'}")
    if problems:
        raise PlanError("the plan belongs to another model: " + "; ".join(problems[:5]))
