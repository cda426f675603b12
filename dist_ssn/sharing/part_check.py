"""Checks each optimizer at its first step: it must not train a part of a shared model without the banks that the part reads.

torch calls a global hook before the steps of all optimizers. It is registered with the first shared layer. An optimizer is checked
once, and again after `add_param_group`, `load_state_dict` or another `share`; every other step costs one look-up.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from dist_ssn.errors import ShareError
from dist_ssn.sharing.columns import load_flat_state
from dist_ssn.sharing.matrix_optimizers import refuse_orthogonal
from dist_ssn.sharing.parts import frozen_by_torch, listed, reads, slots_of
from dist_ssn.sharing.plan_of import ATTRIBUTE
from dist_ssn.sharing.trainer_check import warn_of_trainer

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # all shared layers of this process
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # all models that were given to `share`
_checked: weakref.WeakKeyDictionary[Optimizer, tuple[Any, int, int]] = weakref.WeakKeyDictionary()
_counts = {"hooks": 0, "models": 0}


def register(layer: nn.Module) -> None:
    """Takes note of a shared layer; the first one puts a hook before the steps of all optimizers.

    Args:
        layer: a shared layer.
    """
    if not _counts["hooks"]:
        _counts["hooks"] = 1
        register_optimizer_step_pre_hook(_before_step)
    _layers.add(layer)


def forget(layer: nn.Module) -> None:
    """Removes a layer that is not shared any more.

    Args:
        layer: see `register`.
    """
    _layers.discard(layer)


def register_model(model: nn.Module) -> None:
    """Takes note of a model that was shared, so that the check of optimizers knows its parts.

    Args:
        model: the model.
    """
    _roots.add(model)
    _counts["models"] += 1


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Checks an optimizer once; later steps cost one look-up."""
    if torch.compiler.is_compiling():
        return
    groups = optimizer.param_groups  # `load_state_dict` puts another list there
    checked = _checked.get(optimizer)
    if checked is None or checked[0] is not groups or checked[1:] != (len(groups), _counts["models"]):
        check_optimizer(optimizer)
        banks = {source for layer in list(_layers) for source, _ in slots_of(layer).values()}
        refuse_orthogonal(optimizer, banks)
        load_flat_state(optimizer, banks)
        _checked[optimizer] = groups, len(groups), _counts["models"]
        warn_of_trainer(optimizer)


def check_optimizer(optimizer: Optimizer) -> None:
    """Checks that an optimizer which holds a part's own parameters holds its banks, too, or that another optimizer does.

    All objects of the process are searched only if a bank that trains is in another optimizer or in none.

    Args:
        optimizer: any optimizer.

    Raises:
        ShareError: nobody trains the banks, or FSDP2 averages a layer's own parameters and not its bank.
    """
    held = _held_by(optimizer)
    training = _training()
    _warn_of_a_frozen_owner(held)
    if not training:
        return
    _require_sharding(held)
    _warn_of_half_frozen(training, held)
    _warn_of_left_out(optimizer, training, held)
    missing = {source for source in training if not _holds(held, source)}
    if not missing:
        return
    objects = gc.get_objects()
    for thing in objects:
        if _is(thing, Optimizer) and thing is not optimizer:
            others = _held_by(thing)
            missing = {source for source in missing if not _holds(others, source)}
    if not missing:
        return
    untrained = {source: training[source] for source in missing}
    modules = [thing for thing in objects if _is(thing, nn.Module) and "_modules" in thing.__dict__]
    found = [(part, own, names) for part in modules for own, names in _lacks(part, held, untrained)]
    if not found:
        if not all(param_group["params"] for param_group in optimizer.param_groups):
            _warn_of_an_empty_group(optimizer, held, untrained)
        return
    part, own, names = max(found, key=lambda lack: len(lack[2]))
    raise ShareError(
        f"{type(optimizer).__name__} trains {listed(own)} of {type(part).__name__}, but no optimizer holds the bank that "
        f"generates its weights {listed(names)}, so they would not train: give it model.parameters() or "
        "dist_ssn.parameters_of(part), or, if these weights shall stay, dist_ssn.freeze(model, …)"
    )


def _is(thing: Any, kind: type) -> bool:
    """`isinstance` by the object's real class, which runs no code of the object (proxies answer `__class__`)."""
    return issubclass(type(thing), kind)


def _held_by(optimizer: Optimizer) -> dict[int, Tensor]:
    param_groups = getattr(optimizer, "param_groups", None) or []
    return {id(p): p for param_group in param_groups for p in param_group["params"]}


def _holds(held: dict[int, Tensor], source: Any) -> bool:
    return any(id(p) in held for p in source.parameters() if p.requires_grad)


def _training() -> dict[Any, set[int]]:
    """Source → indices of its weights that train, for all shared layers of the process."""
    found: dict[Any, set[int]] = {}
    for layer in list(_layers):
        for source, index in slots_of(layer).values():
            if index not in getattr(source, "frozen", ()):
                found.setdefault(source, set()).add(index)
    return {source: found[source] for source in found if any(p.requires_grad for p in source.parameters())}


def _lacks(
    part: nn.Module, held: dict[int, Tensor], missing: dict[Any, set[int]]
) -> Iterator[tuple[list[str], list[str]]]:
    """Names of a part's own parameters and of its weights, if all of the former are held, and a bank of the latter is not."""
    lacks = [(source, index) for source, index in reads(part) if index in missing.get(source, ())]
    if not lacks:
        return
    sharded = {hasattr(p, "device_mesh") for source, _ in lacks for p in source.parameters()}
    own = {name: p for name, p in part.named_parameters() if p.requires_grad}
    if not own or any(id(p) not in held for p in own.values()):
        return
    if {hasattr(p, "device_mesh") for p in own.values()} != sharded:
        return  # FSDP2 holds gathered banks at this moment, which are not the tensors of its optimizer
    yield list(own), [source.weight_name(index) for source, index in lacks]


def _require_sharding(held: dict[int, Tensor]) -> None:
    """Raises an error if FSDP2 has sharded a layer's own parameters, and the bank is an ordinary tensor of the optimizer."""
    for layer in list(_layers):
        sharded = [p for p in layer._parameters.values() if id(p) in held and hasattr(p, "device_mesh")]
        for source, index in slots_of(layer).values() if sharded else ():
            if any(id(p) in held and not hasattr(p, "device_mesh") for p in source.parameters()):
                raise ShareError(
                    f"fully_shard has wrapped the layer of {source.weight_name(index)} and not its bank, whose gradient nobody "
                    "averages: wrap the whole model, too, fully_shard(model, reshard_after_forward=False)"
                )


def _warn_of_an_empty_group(optimizer: Optimizer, held: dict[int, Tensor], missing: dict[Any, set[int]]) -> None:
    """Warns of a group without parameters, as `part.parameters()` gives it where a part has no bias and no norm."""
    for root in list(_roots):
        lacks = [source.weight_name(index) for source, index in reads(root) if index in missing.get(source, ())]
        if lacks and any(id(p) in held for p in root.parameters()):
            warnings.warn(
                f"a parameter group of {type(optimizer).__name__} is empty, and no optimizer holds the bank that generates "
                f"{listed(lacks)}: the parameters of a part are dist_ssn.parameters_of(part)",
                stacklevel=2,
            )


def _warn_of_a_frozen_owner(held: dict[int, Tensor]) -> None:
    """Warns of `model[0].requires_grad_(False)` in an `nn.Sequential`, whose first layer holds the banks of all layers."""
    for root in list(_roots):
        if not any(id(p) in held for p in root.parameters()):
            continue
        for path, owner in root.named_modules():
            maker = owner._modules.get(ATTRIBUTE)
            if not path or maker is None or any(p.requires_grad for p in owner.parameters()):
                continue
            banks = {id(bank) for bank in maker.modules()}
            inside = {id(module) for module in owner.modules()}
            others = [
                source.weight_name(index)
                for module in root.modules()
                for source, index in slots_of(module).values()
                if id(module) not in inside and index not in getattr(source, "frozen", ())
                if id(source) in banks
            ]
            if others:
                warnings.warn(
                    f"the parameters of {path} are frozen, and with them the banks that it holds for the whole model, so "
                    f'{listed(others)} do not train: call requires_grad_(True) of it and dist_ssn.freeze(model, "{path}") instead',
                    stacklevel=2,
                )


def _warn_of_left_out(optimizer: Optimizer, training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """Warns of layers that are in no optimizer, as a part is that shall stay as it is, and whose weights a held bank trains."""
    holding = {source for source in training if _holds(held, source)}
    left: dict[type, list[tuple[set[int], list[str]]]] = {}
    kinds: set[type] = set()
    for layer in list(_layers) if holding else ():
        weights = [s.weight_name(i) for s, i in slots_of(layer).values() if s in holding and i in training[s]]
        own = {id(p) for p in layer._parameters.values() if p is not None and p.requires_grad}
        if weights and own & held.keys():
            kinds.add(type(layer))
        elif weights and own:
            left.setdefault(type(layer), []).append((own, weights))
    candidates = [
        one for kind in kinds for one in left.get(kind, ())
    ]  # of a kind that is left out whole, biases are meant
    if not candidates:
        return
    for thing in gc.get_objects():
        if _is(thing, Optimizer) and thing is not optimizer:
            others = _held_by(thing)
            candidates = [one for one in candidates if not one[0] & others.keys()]
    if names := sorted(name for _, weights in candidates for name in weights):
        warnings.warn(
            f"{type(optimizer).__name__} holds the bank that generates {listed(names)}, so they train, though no optimizer holds "
            "the biases of their layers: if these layers shall stay as they are, give them a bank of their own (mapping=) and "
            "dist_ssn.freeze(model, …)",
            stacklevel=2,
        )


def _warn_of_half_frozen(training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """Warns of a part whose own parameters are frozen, as `part.requires_grad_(False)` does, while its weights train on."""
    for layer in list(frozen_by_torch):
        frozen = [s.weight_name(i) for s, i in slots_of(layer).values() if i in getattr(s, "frozen", ())]
        if frozen and any(id(p) in held and p.requires_grad for p in layer.parameters(recurse=False)):
            warnings.warn(
                f"requires_grad_(False) of its layer has frozen {listed(frozen)}, and its bias trains again: call "
                "requires_grad_(True) of the layer, or dist_ssn.unfreeze(model, …), if the weight shall train, too",
                stacklevel=2,
            )
    training = {source: indices for source, indices in training.items() if _holds(held, source)}
    of_banks = {id(p) for source in training for p in source.parameters()}
    for root in list(_roots) if training else ():
        for path, part in root.named_modules():
            own = [p for p in part.parameters() if id(p) not in of_banks]
            if not own or any(p.requires_grad for p in own):
                continue
            inside = {id(module) for module in part.modules()}
            weights = [
                source.weight_name(index)
                for source, index in reads(part)
                if index in training.get(source, ()) and id(source) not in inside
                if getattr(source, "bases", None) is None  # with kept weights, own parameters are frozen by `share`
            ]
            if weights:
                warnings.warn(
                    f"the parameters of {path} are frozen, but its weights {listed(weights)} train, since their bank is outside of "
                    f'{path}: dist_ssn.freeze(model, "{path}") freezes both',
                    stacklevel=2,
                )
                break
