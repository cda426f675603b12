"""`control`: replaces a model's weights by those of a baseline, in place, like `share` does by those of banks."""

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
"""Name → function from (specs, budget in parameters, seed) to the generator of the weights."""

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
    """Replaces the weights of `model` by those of a baseline, in place, with at most `budget` parameters.

    The weights get new initial values, with the standard deviation that each layer was initialized with. Call it before the
    optimizer is made, and before the model is wrapped for training.

    Args:
        model: any module with floating-point weights, initialized as for dense training.
        name: of the baseline, a key of `CONTROLS`.
        budget: largest number of trainable parameters that replace the weights, as for `share`.
        include: as for `share`.
        exclude: as for `share`.
        seed: of initial values, and of everything pseudo-random.

    Returns:
        The model itself.

    Raises:
        ShareError: the baseline is unknown, or the model cannot be shared.
        BudgetError: the budget is too small for this baseline, or not smaller than the weights.
    """
    if name not in CONTROLS:
        raise ShareError(unknown_choice("control", name, CONTROLS))
    specs = find_specs(model, include, exclude)
    allowed = resolve_budget(budget, specs)
    if allowed >= specs.numel:
        raise BudgetError(
            f"budget {budget!r} allows {allowed:,} parameters, and the weights have {specs.numel:,} elements: the control "
            f"{name!r} needs a smaller budget"
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
