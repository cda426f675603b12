"""`control` replaces a model's weights by those of a control, in place, as `share` does by those of banks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from dist_ssn.baselines.factors import lowrank, tied
from dist_ssn.baselines.generator import Generator
from dist_ssn.baselines.hashed import hashed, hashed_global
from dist_ssn.errors import BudgetError, ShareError, unknown_choice
from dist_ssn.model.selectors import Selector
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan.budget import Budget, resolve_budget
from dist_ssn.sharing.attach import check_order, install

CONTROLS: dict[str, Callable[[Specs, int, int], Generator]] = {
    "tied": tied,
    "hashed": hashed,
    "hashed-global": hashed_global,
    "lowrank": lowrank,
}
"""name → the function from (specs, budget in numbers, seed) to what makes the weights."""

_ATTRIBUTE = "dist_ssn_control"


def control(
    model: nn.Module,
    name: str,
    budget: Budget,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replaces the weights of `model` by those of the control `name`, in place; the parameters are at most `budget`.

    The weights start with fresh values of the standard deviation that each layer was initialized with. Do this before the
    optimizer is made, and before the model is wrapped for training.

    Args:
        name: a key of `CONTROLS`.
        budget: trainable numbers that may stand for all the weights, as for `share`.
        include, exclude: which weights, as for `share`.
        seed: of initial values and of what is pseudo-random.

    Returns:
        the model itself.

    Raises:
        ShareError: the control is unknown, or the model cannot be shared; BudgetError: the budget is too small for this control,
            or no smaller than the weights themselves.
    """
    if name not in CONTROLS:
        raise ShareError(unknown_choice("control", name, CONTROLS))
    specs = find_specs(model, include, exclude)
    allowed = resolve_budget(budget, specs)
    if allowed >= specs.numel:
        raise BudgetError(
            f"budget {budget!r} allows {allowed:,} numbers, and the weights themselves have {specs.numel:,}: the control {name!r} "
            "needs a budget below them"
        )
    check_order(model, specs)
    _attach(model, CONTROLS[name](specs, allowed, seed), specs)
    return model


def _attach(model: nn.Module, generator: Generator, specs: Specs) -> None:
    first = model.get_parameter(specs.weights[0].name)
    generator.to(first.device, first.dtype)
    made: Any = generator  # which stands where share_layer expects a Bank
    places: dict[str, dict[str, Any]] = {}
    for index, weight in enumerate(specs.weights):
        for name in (weight.name, *weight.aliases):
            module, _, local = name.rpartition(".")
            places.setdefault(module, {})[local] = (made, index)
    install(model, _ATTRIBUTE, generator, places)
