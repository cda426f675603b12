"""`share` attaches a plan to a model, in place; `materialize` gives the dense model back."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.errors import PlanError, ShareError
from dist_ssn.model.selectors import Selector
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan import Morph, Plan, make_plan
from dist_ssn.plan.budget import Budget
from dist_ssn.plan.compare import check_plan, plan_difference
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.initial_values import initialize
from dist_ssn.sharing.layers import share_layer, unshare_layer

_ATTRIBUTE = "dist_ssn"
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
        check_plan(plan, specs)
    check_order(model, specs)
    _warn_of_seeds(specs)
    _attach(model, plan, specs)
    return model


class BankSet(nn.Module):
    """All banks of a model, and the plan that they follow. Passes its input on, should a container call it."""

    def __init__(self, plan: Plan, left_out: tuple[tuple[str, str], ...], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.plan, self.left_out = plan, left_out
        for group in plan.groups:
            if hasattr(self, group.name):
                raise PlanError(f"group name {group.name!r} is taken by torch.nn.Module: choose another")
            self.add_module(group.name, Bank(group, plan.seed, device, dtype))

    def banks(self) -> Iterator[Bank]:
        for group in self.plan.groups:
            yield self.get_submodule(group.name)  # type: ignore[misc]

    def forward(self, input: Any = None) -> Any:
        return input

    def get_extra_state(self) -> Tensor:
        """The plan as bytes, so that a state dict says which plan it belongs to."""
        return torch.frombuffer(bytearray(self.plan.to_json(indent=None).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuses a state dict of another plan.

        Raises:
            PlanError: says what the first difference is.
        """
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise PlanError("the state dict holds no plan where one belongs: it was not written by dist_ssn")
        difference = plan_difference(self.plan, Plan.from_json(bytes(state.cpu().tolist()).decode(errors="replace")))
        if difference:
            raise PlanError(
                f"the state dict belongs to another plan: {difference}; build the model with share(model, plan=…)"
            )


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
    install(model, _ATTRIBUTE, banks, slots)


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


def _bank_sets(model: nn.Module) -> list[BankSet]:
    return [module for module in model.modules() if isinstance(module, BankSet)]


def shared_plan(model: nn.Module) -> Plan | None:
    """The plan of a shared model (wrapped or not), None for a dense one.

    Raises:
        ShareError: several parts of the model were shared apart: ask each part.
    """
    sets = _bank_sets(model)
    if len(sets) > 1:
        raise ShareError(
            f"{type(model).__name__} has {len(sets)} parts that were shared apart: ask each part for its plan"
        )
    return sets[0].plan if sets else None


def materialize(model: nn.Module) -> nn.Module:
    """An ordinary dense copy of a shared model: base classes, stored weights, ties as they were, no trace of a bank.

    Raises:
        ShareError: the model is not shared.
    """
    if not _bank_sets(model):
        raise ShareError(f"{type(model).__name__} is not shared: there is nothing to materialize")
    dense = copy.deepcopy(model)
    made: dict[tuple[int, int], nn.Parameter] = {}
    for module in list(dense.modules()):
        slots: dict[str, tuple[Bank, int]] = module.__dict__.get("_dist_ssn_slots", {})
        for bank, index in slots.values():
            if (id(bank), index) not in made:
                with torch.no_grad():
                    made[id(bank), index] = nn.Parameter(bank(index).clone())
        if slots:
            unshare_layer(module, {name: made[id(bank), index] for name, (bank, index) in slots.items()})
    for module in list(dense.modules()):
        if isinstance(module._modules.get(_ATTRIBUTE), BankSet):
            del module._modules[_ATTRIBUTE]
    return dense


@dataclass(frozen=True)
class Summary:
    """Numbers of a model: trainable ones in all, those that stand for no weight, and the plans of what is shared."""

    parameters: int
    own_parameters: int
    plans: tuple[Plan, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """Names of parameters of two or more dimensions that are stored as ever, each with the reason."""

    @property
    def plan(self) -> Plan | None:
        """The plan of a model that was shared as a whole."""
        return self.plans[0] if len(self.plans) == 1 else None

    def __str__(self) -> str:
        if not self.plans:
            return f"dense model, {self.parameters:,} trainable parameters"
        plans = ", and ".join(map(str, self.plans))
        text = f"{self.parameters:,} trainable parameters: {plans}, and {self.own_parameters:,} of the model's own"
        return f"{text}; left as they are: {left_out_text(self.left_out)}" if self.left_out else text


def summary(model: nn.Module) -> Summary:
    """Counts the trainable numbers of a model, shared or dense."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sets = _bank_sets(model)
    shared = sum(p.numel() for banks in sets for p in banks.parameters() if p.requires_grad)
    left_out = tuple(entry for banks in sets for entry in banks.left_out)
    return Summary(total, total - shared, tuple(banks.plan for banks in sets), left_out)


def left_out_text(left_out: Sequence[tuple[str, str]], most: int = 8) -> str:
    """What is not shared, with the reasons, as one line."""
    more = f", and {len(left_out) - most} more" if len(left_out) > most else ""
    return ", ".join(f"{name} ({reason})" for name, reason in left_out[:most]) + more
