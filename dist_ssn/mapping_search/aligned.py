"""One bank that all layers read alike, for the measurements of "pretrain" and "gradients".

Every weight mixes the same K square templates, resized to its shape, by K coefficients of its own. So coefficients of different
layers are comparable, and their gradients reach the same elements of the bank.

Source: Plummer et al., arXiv 2006.10598, section 3.3 ("mapping layers to parameter groups").
"""

from __future__ import annotations

import math

from dist_ssn.errors import BudgetError
from dist_ssn.model.specs import LayerSpec, Specs
from dist_ssn.plan import Group, Plan, Slot


def aligned_plan(specs: Specs, budget: int, templates: int, seed: int) -> Plan:
    """A plan of one bank of about `budget` parameters, with no template larger than the largest weight.

    It serves for measurements only: a weight smaller than a template reads it scaled down, which no ordinary plan does.

    Args:
        specs: the model's weights.
        budget: number of parameters.
        templates: K.
        seed: of the plan.

    Raises:
        BudgetError: the budget is too small for K templates of one element.
    """
    weights = specs.weights
    room = (budget - templates * len(weights)) // templates
    side = math.isqrt(max(0, min(room, max(weight.numel for weight in weights))))
    if side < 1:
        raise BudgetError(
            f"a budget of {budget:,} parameters is too small to compare {len(weights)} weights by {templates} templates: use the "
            "method weights-free, or fewer templates"
        )
    slots = tuple(_slot(weight, templates, side) for weight in weights)
    bank = templates * side * side
    return Plan((Group("all", bank, slots),), bank + templates * len(weights), seed)


def _slot(weight: LayerSpec, templates: int, side: int) -> Slot:
    return Slot(
        name=weight.name,
        shape=weight.shape,
        morph="inter",
        start=0,
        templates=templates,
        coefficients=templates,
        template_shape=(side, side),
        zero_row=weight.zero_row,
        aliases=weight.aliases,
    )
