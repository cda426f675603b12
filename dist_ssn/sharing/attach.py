"""`share`: attaches a plan to a model, in place."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ssn.errors import PlanError, ShareError
from dist_ssn.model.selectors import Selector
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan import Morph, Plan, make_plan
from dist_ssn.plan.budget import Budget
from dist_ssn.plan.compare import require_plan_fits
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bank_set import ATTRIBUTE, BankSet
from dist_ssn.sharing.initial_values import initialize
from dist_ssn.sharing.layers import share_layer

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def share(
    model: nn.Module,
    budget: Budget | None = None,
    *,
    mapping: str | Mapping[str, str] = "auto",
    morph: str | Morph = "auto",
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    plan: Plan | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replaces the stored weights of `model` by weights generated from a few small banks, in place.

    The weights start with fresh values of the standard deviation that each layer was initialized with; what the model held
    before is lost. Biases, norms and everything else stay as they are. Do this before the optimizer is made, and before the
    model is wrapped for training.

    Args:
        model: any module with floating-point weights, initialized as for dense training.
        budget: trainable numbers that may stand for all the weights: 0.1, "10%", 5_000_000, "5M", "5MB", "5MB/step".
        mapping, morph, include, exclude, seed: see `make_plan`.
        plan: rebuild exactly this one, instead of `budget`.

    Returns:
        the model itself.

    Raises:
        ShareError: the model cannot be shared; PlanError: the plan is of another model; BudgetError: see `make_plan`.
    """
    if (plan is None) == (budget is None):
        raise ShareError("share() needs either a budget, share(model, 0.1), or a plan, share(model, plan=plan)")
    if plan is None:
        assert budget is not None
        specs = find_specs(model, include, exclude)
        plan = make_plan(specs, budget, mapping=mapping, morph=morph, seed=seed)
    elif not isinstance(plan, Plan):
        raise PlanError(f"plan is of type {type(plan).__name__}: read it first, Plan.from_json(Path(...).read_text())")
    else:
        names = [slot.name for _, slot in plan.slots()]
        missing = sorted(set(names) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
        if missing:
            raise PlanError(
                f"the plan has a weight {missing[0]!r} that {type(model).__name__} does not have: build the same model"
            )
        specs = find_specs(model, include=names)
        require_plan_fits(plan, specs)
    check_order(model, specs)
    _warn_of_seeds(specs)
    _attach(model, plan, specs)
    return model


def check_order(model: nn.Module, specs: Specs) -> None:
    """Sharing comes first: who took hold of a weight before would train or average what nobody reads any more.

    Raises:
        ShareError: an optimizer holds a weight, or the model is wrapped for training.
    """
    names = {id(model.get_parameter(weight.name)): weight.name for weight in specs.weights}
    for thing in gc.get_objects() if _is_held(model, specs) else ():
        kind = type(thing)
        if issubclass(kind, torch.optim.Optimizer):
            held = [p for group in thing.param_groups for p in group["params"] if id(p) in names]
            if held:
                raise ShareError(
                    f"an optimizer ({kind.__name__}) holds {names[id(held[0])]}, which nobody would read any more: "
                    "share the model first, and make the optimizer after it (or delete the one that is not used)"
                )
        elif issubclass(kind, (nn.parallel.DistributedDataParallel, nn.DataParallel)) and any(
            id(p) in names for p in thing.module.parameters()
        ):
            raise ShareError(f"the model is wrapped in a {kind.__name__}: share it first and wrap it afterwards")


def _is_held(model: nn.Module, specs: Specs) -> bool:
    """Whether anybody but modules knows one of the weights: the quick answer is mostly no."""
    for weight in specs.weights:
        path, _, local = weight.name.rpartition(".")
        parameter = model.get_submodule(path)._parameters[local]
        if sys.getrefcount(parameter) > 3 + len(weight.aliases):  # the module, our name for it, and the question itself
            return True
    return False


def _warn_of_seeds(specs: Specs) -> None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if measured := [weight.name for weight in specs.weights if weight.is_measured]:
        warnings.warn(
            f"the initial scale of {measured[0]} ({len(measured)} weights in all) was measured on its random values: if not all "
            "ranks were seeded alike, they now follow different plans; give them one, share(model, plan=...)",
            stacklevel=3,
        )


def _attach(model: nn.Module, plan: Plan, specs: Specs) -> None:
    """Builds the banks and turns every layer that holds a weight into a layer that generates it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = parameters[specs.weights[0].name]
    banks = BankSet(plan, specs.left_out, first.device, first.dtype)
    for bank in banks.banks():
        initialize(bank)
    places = {weight.name: (weight.name, *weight.aliases) for weight in specs.weights}
    slots: dict[str, dict[str, tuple[Bank, int]]] = {}
    for bank in banks.banks():
        for index, slot in enumerate(bank.group.slots):
            for name in places[slot.name]:
                module, _, parameter = name.rpartition(".")
                slots.setdefault(module, {})[parameter] = (bank, index)
    install(model, ATTRIBUTE, banks, slots)


def install(model: nn.Module, attribute: str, maker: nn.Module, slots: Mapping[str, dict[str, Any]]) -> None:
    """Gives `model` a module that makes weights, as `attribute` of its owner, and lets the layers ask it.

    Args:
        slots: name of a layer → its parameters → (what makes the weight, the weight's number there).

    Raises:
        ShareError: the owner has such an attribute already.
    """
    owner = owner_of(model, next(iter(slots)))
    if hasattr(owner, attribute):
        raise ShareError(f"{type(owner).__name__} has an attribute {attribute!r} already: rename it")
    for module, layer_slots in slots.items():
        share_layer(model.get_submodule(module), layer_slots)
    owner.add_module(attribute, maker)


def owner_of(model: nn.Module, first: str) -> nn.Module:
    """The module that the banks belong to: the root, but where it is a container, which calls or lists all its children.

    Then it is the module around the first weight (named `first`) that is none: the layer, or who keeps its parametrization.
    """
    path = first if isinstance(model, _CONTAINERS) else ""
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)
