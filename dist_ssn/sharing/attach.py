"""`share`: attaches a plan to a model, in place."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dist_ssn.errors import PlanError, ShareError
from dist_ssn.model.selectors import Selector
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan import Morph, Plan, make_plan
from dist_ssn.plan.budget import Budget
from dist_ssn.plan.compare import require_plan_fits
from dist_ssn.plan.scales import scales_of
from dist_ssn.sharing.attributes import carry_attributes
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bank_set import BankSet, bank_sets
from dist_ssn.sharing.bases import Bases
from dist_ssn.sharing.copies import require_apart, warn_of_copies
from dist_ssn.sharing.generation import check_mode, set_generation, watch_forward
from dist_ssn.sharing.holders import views_of, warn_of_holders
from dist_ssn.sharing.layers import share_layer
from dist_ssn.sharing.part_check import register_model
from dist_ssn.sharing.plan_of import ATTRIBUTE
from dist_ssn.sharing.pretrained import guard_saving, warn_of_pretrained
from dist_ssn.sharing.scopes import is_lowered
from dist_ssn.sharing.ties import keep_ties
from dist_ssn.sharing.train_beside import names_of, specs_of_kept, train_only
from dist_ssn.torch_private import inside_compiled, storage_users

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_TINY_BANK = 4
"""A weight of fewer parameters is hardly more than one pattern of signs."""


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
    generate: str = "auto",
    keep: bool = False,
    train: str | Iterable[str] = (),
) -> nn.Module:
    """Replaces the stored weights of `model` by weights generated from a few small banks, in place.

    The weights get new initial values, with the standard deviation that each layer was initialized with; their former values are
    lost. Biases, norms and all other parameters stay as they are. Call it before the optimizer is made, and before the model is
    wrapped for training.

    With `keep` it is for fine-tuning: the weights stay, frozen, and the banks generate a difference, which starts at zero. Only the
    banks are trained, sent and saved.

    Args:
        model: any module with floating-point weights, initialized as for dense training. Of a compiled one,
            `torch.compile(model)`, the module inside is shared.
        budget: largest number of trainable parameters that replace the weights: 0.1, "10%", 5_000_000, "5M", "5MB",
            "5MB/step".
        mapping: see `make_plan`.
        morph: see `make_plan`.
        include: see `make_plan`.
        exclude: see `make_plan`.
        plan: follow exactly this plan; given instead of `budget`. A weight without a slot stays dense, with a warning unless
            `include` or `exclude` leave it out.
        seed: see `make_plan`.
        generate: see `set_generation`.
        keep: keep the weights' values, and generate differences from them. Everything else of the model is frozen.
        train: with `keep`, names of parameters or modules, or globs over them, that are trained whole beside the banks, such as a
            new head.

    Returns:
        The model itself.

    Raises:
        ShareError: the model cannot be shared.
        PlanError: the plan belongs to another model.
        BudgetError: see `make_plan`.
    """
    if (plan is None) == (budget is None):
        raise ShareError("share() needs either a budget, share(model, 0.1), or a plan, share(model, plan=plan)")
    names = _names_to_train(keep, train)
    given, model = model, inside_compiled(model)
    _require_plain(model)
    if plan is None:
        assert budget is not None
        specs = specs_of_kept(model, include, exclude, names) if keep else find_specs(model, include, exclude)
        plan = make_plan(specs, budget, mapping=mapping, morph=morph, seed=seed, keep=keep)
        _warn_of_tiny_banks(plan)
    else:
        specs = specs_of_plan(model, plan, keep)
        if not keep:
            _warn_of_missing_slots(model, specs, include, exclude)
    check_order(model, specs)
    require_apart(model, specs)
    if keep:
        _require_kept_values(model, specs)
    else:
        warn_of_pretrained(model, specs)
        warn_of_copies(model, specs)
    check_mode(generate)
    whole = names_of(model, names)
    if both := sorted({weight.name for weight in specs.weights} & set(whole)):
        raise ShareError(f"train= names {both[0]}, which the plan generates: leave it out of one of them")
    _attach(model, plan, specs)
    if keep:
        train_only(model, whole)
        bank_sets(model)[0].trained_whole = tuple(whole)
    set_generation(model, generate)
    guard_saving(model)
    return given


def _names_to_train(keep: object, train: object) -> list[str]:
    """The names and globs of `train`.

    Raises:
        ShareError: `keep` or `train` is something else, or they do not go together.
    """
    if not isinstance(keep, bool):
        raise ShareError(f"keep must be True or False, got {keep!r}")
    names: list[Any] = [train] if isinstance(train, str) else list(train) if isinstance(train, Iterable) else [train]
    if not all(isinstance(name, str) for name in names):
        raise ShareError(f"train must be a name or a glob of parameters, or a list of them, got {train!r:.60}")
    if names and not keep:
        raise ShareError("train= goes with keep=True: without it everything is trained")
    return names


def _require_kept_values(model: nn.Module, specs: Specs) -> None:
    """Checks that there are values to keep."""
    empty = [weight.name for weight in specs.weights if model.get_parameter(weight.name).is_meta]
    if empty:
        raise ShareError(
            f"{empty[0]} is on 'meta' and has no values to keep: load them first, "
            "model.load_state_dict(safetensors.torch.load_file(file), assign=True) copies nothing; "
            "make_plan(model, budget, keep=True) needs none"
        )


def specs_of_plan(model: nn.Module, plan: Plan, keep: bool) -> Specs:
    """Specs of the weights that a plan has slots for; the plan must belong to the model, and to `keep`."""
    if not isinstance(plan, Plan):
        raise PlanError(f"plan is of type {type(plan).__name__}: read it first, Plan.from_json(Path(...).read_text())")
    if plan.keep != keep:
        raise PlanError(
            f"the plan is {'' if plan.keep else 'not '}for weights that are kept: call share(model, plan=plan, keep={plan.keep})"
        )
    names = [slot.name for _, slot in plan.slots()]
    missing = sorted(set(names) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if missing:
        raise PlanError(
            f"the plan has a weight {missing[0]!r} that {type(model).__name__} does not have: build the same model"
        )
    specs = find_specs(model, include=names, structure=not plan.keep, frozen=plan.keep)
    require_plan_fits(plan, specs)
    return specs


def _require_plain(model: nn.Module) -> None:
    """Checks that no form of FSDP holds the parameters already."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh") or getattr(parameter, "_is_flat_param", False):
            raise ShareError(
                f"{name} is sharded already, by FSDP or as a DTensor: share the model first and shard it afterwards"
            )


def check_order(model: nn.Module, specs: Specs) -> None:
    """Checks that the model is shared before an optimizer or a wrapper holds its weights, which no layer would read any more.

    Raises:
        ShareError: an optimizer holds a weight, or the model is wrapped for training.
    """
    names = {id(model.get_parameter(weight.name)): weight.name for weight in specs.weights}
    held_weights = _held(model, specs)
    for thing in gc.get_objects() if held_weights else ():
        kind = type(thing)
        if issubclass(kind, torch.optim.Optimizer):
            held = [p for param_group in thing.param_groups for p in param_group["params"] if id(p) in names]
            if held:
                raise ShareError(
                    f"an optimizer ({kind.__name__}) holds {names[id(held[0])]}, which no layer would read any more: "
                    "share the model first, and make the optimizer after it (or delete the one that is not used)"
                )
        elif issubclass(kind, (nn.parallel.DistributedDataParallel, nn.DataParallel)) and any(
            id(p) in names for p in thing.module.parameters()
        ):
            raise ShareError(f"the model is wrapped in a {kind.__name__}: share it first and wrap it afterwards")
    if not warn_of_holders(held_weights, model):
        weights = ((weight.name, model.get_parameter(weight.name)) for weight in specs.weights)
        viewed = {name: weight for name, weight in weights if (storage_users(weight) or 1) > 1}
        warn_of_holders(views_of(viewed, model), model)


def _held(model: nn.Module, specs: Specs) -> dict[str, nn.Parameter]:
    """The weights that an object other than a module refers to; a quick test, which mostly finds none."""
    found: dict[str, nn.Parameter] = {}
    for weight in specs.weights:
        own = 2  # our variable, and getrefcount's argument
        for name in (weight.name, *weight.aliases):
            path, _, local = name.rpartition(".")
            module = model.get_submodule(path)
            own += 2 if isinstance(module, nn.RNNBase) else 1  # which has a list of its weights
        parameter = module._parameters[local]
        assert parameter is not None
        if sys.getrefcount(parameter) > own:
            found[weight.name] = parameter
    return found


def _warn_of_missing_slots(
    model: nn.Module,
    specs: Specs,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
) -> None:
    dense = [name for name, reason in specs.left_out if reason == "not included"]
    if dense:  # among them are weights that no plan would share, such as those that start constant
        wanted = {weight.name for weight in find_specs(model, include, exclude).weights}
        dense = [name for name in dense if name in wanted]
    if dense:
        warnings.warn(
            f"the plan has no slot for {dense[0]} ({len(dense)} weights in all), which stays dense: if that is meant, say so "
            "by exclude=..., as when the plan was made",
            stacklevel=3,
        )


def _warn_of_tiny_banks(plan: Plan) -> None:
    tiny = [group for group in plan.groups if group.parameters < min(_TINY_BANK, group.numel)]
    if tiny:
        first = min(tiny, key=lambda group: group.size)
        names = ", ".join(slot.name for slot in first.slots[:3])
        warnings.warn(
            f"bank {first.name} has {first.size} element{'s' * (first.size > 1)} for the {first.numel:,} of {names} "
            f"({len(tiny)} such banks in all): its weights can hardly learn; leave them out, exclude=..., or give a larger budget",
            stacklevel=3,
        )


def _attach(model: nn.Module, plan: Plan, specs: Specs) -> None:
    """Builds the banks, and turns each layer that holds a weight into a layer that generates it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = parameters[specs.weights[0].name]
    scales = scales_of(plan, specs.weights)
    if first.is_meta and plan.scales is None:
        weight = specs.weights[0]
        warnings.warn(
            f"{type(model).__name__} is on 'meta', so the initial scales of its weights are assumed, such as "
            f"{weight.init_std:.3g} for {weight.name}: after to_empty(), dist_ssn.initialize(model, {{glob: standard deviation}}) "
            "sets others",
            stacklevel=3,
        )
    dtype = torch.promote_types(first.dtype, torch.float32) if plan.keep else first.dtype
    banks = BankSet(plan, scales, specs.left_out, first.device, dtype)
    is_meta = first.is_meta
    places = {weight.name: (weight.name, *weight.aliases) for weight in specs.weights}
    if plan.keep:
        for bank in banks.banks():
            bank.keep(Bases([parameters[slot.name] for slot in bank.group.slots]))
    slots: dict[str, dict[str, tuple[Bank, int]]] = {}
    for bank in banks.banks():
        carry_attributes({slot.name: parameters[slot.name] for slot in bank.group.slots}, bank)
        for index, slot in enumerate(bank.group.slots):
            for name in places[slot.name]:
                module, _, parameter = name.rpartition(".")
                slots.setdefault(module, {})[parameter] = (bank, index)
        readers = [
            [model.get_submodule(name.rpartition(".")[0]) for name in places[slot.name]] for slot in bank.group.slots
        ]
        bank.lowered = frozenset(index for index, layers in enumerate(readers) if all(map(is_lowered, layers)))
        bank.recurrent = frozenset(
            index for index, layers in enumerate(readers) if any(isinstance(layer, nn.RNNBase) for layer in layers)
        )
    install(model, ATTRIBUTE, banks, slots)
    watch_forward(model, banks)
    del parameters, first  # the dense weights, so that they are gone when the banks get their values
    for bank in banks.banks():
        if not is_meta:
            bank.reset_parameters(scales[bank.group.name])


def install(model: nn.Module, attribute: str, maker: nn.Module, slots: Mapping[str, dict[str, Any]]) -> None:
    """Adds a module that generates weights to `model`, and makes the layers read their weights from it.

    Args:
        model: is changed.
        attribute: name of the module in its owner.
        maker: the module.
        slots: name of a layer → name of a parameter → (source of the weight, index of the weight there).

    Raises:
        ShareError: the owner has an attribute of this name already.
    """
    owner = owner_of(model, next(iter(slots)))
    if hasattr(owner, attribute):
        raise ShareError(f"{type(owner).__name__} has an attribute {attribute!r} already: rename it")
    for module, layer_slots in slots.items():
        share_layer(model.get_submodule(module), layer_slots)
    _add_second(owner, attribute, maker)
    register_model(model)
    keep_ties(model)


def _add_second(owner: nn.Module, attribute: str, maker: nn.Module) -> None:
    """Adds a child after the first one, so that `children()[0]`, `children()[-1]` and `children()[:-1]` are the dense model's."""
    owner.add_module(attribute, maker)
    children = list(owner._modules.items())
    for name, child in children[1:-1]:
        del owner._modules[name]
        owner._modules[name] = child


def owner_of(model: nn.Module, first: str) -> nn.Module:
    """The module that the banks are added to.

    This is the root, unless the root is a container, which calls or lists all its children. Then it is the innermost module around
    the first weight that is no container: the layer, or its parametrization.

    Args:
        model: the root.
        first: name of the module that holds the first weight.
    """
    path = first if isinstance(model, _CONTAINERS) else ""
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)
