"""Checks each optimizer at its first step: it must not train a part of a shared model without the banks that the part reads.

torch calls a global hook before the steps of all optimizers. It is registered with the first shared layer. An optimizer is checked
once, and again after `add_param_group`, `load_state_dict` or another `share`; every other step costs one look-up.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from dist_ssn.errors import ShareError
from dist_ssn.sharing.columns import load_flat_state
from dist_ssn.sharing.matrix_optimizers import refuse_orthogonal
from dist_ssn.sharing.part_warnings import (
    warn_of_a_frozen_bank,
    warn_of_a_frozen_owner,
    warn_of_frozen_that_change,
    warn_of_half_frozen,
    warn_of_learning_rates,
    warn_of_left_out,
    warn_of_two_optimizers,
)
from dist_ssn.sharing.parts import listed, reads, slots_of
from dist_ssn.sharing.start_values import note_step
from dist_ssn.sharing.trained_by import checked, held_by, holds, is_a, layers, roots
from dist_ssn.sharing.trainer_check import warn_of_trainer

_counts = {"hooks": 0, "models": 0}


def register(layer: nn.Module) -> None:
    """Takes note of a shared layer; the first one puts a hook before the steps of all optimizers.

    Args:
        layer: a shared layer.
    """
    if not _counts["hooks"]:
        _counts["hooks"] = 1
        register_optimizer_step_pre_hook(_before_step)
    layers.add(layer)


def forget(layer: nn.Module) -> None:
    """Removes a layer that is not shared any more.

    Args:
        layer: see `register`.
    """
    layers.discard(layer)


def register_model(model: nn.Module) -> None:
    """Takes note of a model that was shared, so that the check of optimizers knows its parts.

    Args:
        model: the model.
    """
    roots.add(model)
    _counts["models"] += 1


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Checks an optimizer once; later steps cost one look-up."""
    if torch.compiler.is_compiling():
        return
    note_step()
    groups = optimizer.param_groups  # `load_state_dict` puts another list there
    seen = checked.get(optimizer)
    if seen is None or seen[0] is not groups or seen[1:] != (len(groups), _counts["models"]):
        check_optimizer(optimizer)
        banks = {source for layer in list(layers) for source, _ in slots_of(layer).values()}
        refuse_orthogonal(optimizer, banks)
        load_flat_state(optimizer, banks)
        checked[optimizer] = groups, len(groups), _counts["models"]
        warn_of_trainer(optimizer)


def check_optimizer(optimizer: Optimizer) -> None:
    """Checks that an optimizer which holds a part's own parameters holds its banks, too, or that another optimizer does.

    All objects of the process are searched only if a bank that trains is in another optimizer or in none.

    Args:
        optimizer: any optimizer.

    Raises:
        ShareError: nobody trains the banks, or FSDP2 averages a layer's own parameters and not its bank.
    """
    held = held_by(optimizer)
    training = _training()
    warn_of_a_frozen_owner(held)
    warn_of_a_frozen_bank(held)
    if not training:
        return
    _require_sharding(held)
    warn_of_half_frozen(training, held)
    warn_of_frozen_that_change(training, held)
    warn_of_left_out(optimizer, training, held)
    warn_of_two_optimizers(optimizer, training, held)
    warn_of_learning_rates(optimizer, training)
    missing = {source for source in training if not holds(held, source)}
    if not missing:
        return
    objects = gc.get_objects()
    for thing in objects:
        if is_a(thing, Optimizer) and thing is not optimizer:
            others = held_by(thing)
            missing = {source for source in missing if not holds(others, source)}
    if not missing:
        return
    untrained = {source: training[source] for source in missing}
    modules = [thing for thing in objects if is_a(thing, nn.Module) and "_modules" in thing.__dict__]
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


def _training() -> dict[Any, set[int]]:
    """Source → indices of its weights that train, for all shared layers of the process."""
    found: dict[Any, set[int]] = {}
    for layer in list(layers):
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
    for layer in list(layers):
        sharded = [p for p in layer._parameters.values() if id(p) in held and hasattr(p, "device_mesh")]
        for source, index in slots_of(layer).values() if sharded else ():
            if any(id(p) in held and not hasattr(p, "device_mesh") for p in source.parameters()):
                raise ShareError(
                    f"fully_shard has wrapped the layer of {source.weight_name(index)} and not its bank, whose gradient nobody "
                    "averages: wrap the whole model, too, fully_shard(model, reshard_after_forward=False)"
                )


def _warn_of_an_empty_group(optimizer: Optimizer, held: dict[int, Tensor], missing: dict[Any, set[int]]) -> None:
    """Warns of a group without parameters, as `part.parameters()` gives it where a part has no bias and no norm."""
    for root in list(roots):
        lacks = [source.weight_name(index) for source, index in reads(root) if index in missing.get(source, ())]
        if lacks and any(id(p) in held for p in root.parameters()):
            warnings.warn(
                f"a parameter group of {type(optimizer).__name__} is empty, and no optimizer holds the bank that generates "
                f"{listed(lacks)}: the parameters of a part are dist_ssn.parameters_of(part)",
                stacklevel=2,
            )
