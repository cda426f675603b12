"""Checks each optimizer at its first step: it must not train a part of a shared model without the banks that the part reads.

torch calls a global hook before the steps of all optimizers. It is registered with the first shared layer. An optimizer is checked
once, and again after `add_param_group`, `load_state_dict`, another `share`, and a change of flags or learning rates. Every other
step compares a few of these, which takes some microseconds.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.beside import Weight, weights_of_process
from dist_ssn.sharing.columns import load_flat_state
from dist_ssn.sharing.matrix_optimizers import refuse_orthogonal
from dist_ssn.sharing.part_warnings import (
    note_two_optimizers,
    of_a_bias_that_trains_again,
    of_a_frozen_bank,
    of_a_frozen_owner,
    of_an_empty_group,
    of_frozen_parts,
    of_frozen_that_change,
    of_learning_rates,
    of_left_out,
)
from dist_ssn.sharing.parts import listed, reads, slots_of
from dist_ssn.sharing.start_values import note_step
from dist_ssn.sharing.trained_by import Seen, checked, held_by, holds, is_a, layers, roots
from dist_ssn.sharing.trainer_check import warn_of_trainer

_MOST_CHECKS = 32
"""Number of checks of one optimizer, so that a program that freezes other parts at each step does not wait for them."""
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
    """Checks an optimizer at its first step, and again after a change that this step finds."""
    if torch.compiler.is_compiling():
        return
    note_step()
    seen = checked.get(optimizer)
    if seen is None or _is_due(seen, optimizer.param_groups):
        check_optimizer(optimizer)
    if seen is not None and seen.waiting:
        _tell(seen.waiting, seen.told)
        seen.waiting.clear()


def _is_due(seen: Seen, groups: list[Any]) -> bool:
    """True if the optimizer has other groups (`load_state_dict` makes a list), or a flag or learning rate is another one."""
    if seen.groups is not groups or seen.size != len(groups) or seen.models != _counts["models"]:
        return True
    return seen.has_changed() and seen.checks < _MOST_CHECKS


def check_optimizer(optimizer: Optimizer) -> None:
    """Checks an optimizer, and takes note of what was seen. After an error, the next step checks again.

    Args:
        optimizer: any optimizer.

    Raises:
        ShareError: it does not train the weights of a part as it trains the part's own parameters.
    """
    now = Seen(optimizer, _counts["models"], checked.pop(optimizer, None))
    weights = weights_of_process()
    _check_parts(optimizer, weights, now.told)
    banks = {weight.source for weight in weights}
    refuse_orthogonal(optimizer, banks)
    load_flat_state(optimizer, banks)
    _watch(now, weights, held_by(optimizer))
    checked[optimizer] = now
    warn_of_trainer(optimizer)


def _watch(seen: Seen, weights: list[Weight], held: dict[int, Tensor]) -> None:
    """Lets later steps compare what this optimizer trains, and what is beside it."""
    parameters: dict[int, Tensor] = {}
    banks: dict[int, Any] = {}
    for source, own in ((weight.source, weight.own) for weight in weights):
        of_bank = {id(p): p for p in source.parameters()}
        beside = {id(p): p for _, p in own}
        if (of_bank | beside).keys() & held.keys():
            parameters |= of_bank | beside
            banks |= {id(source): source} if isinstance(source, Bank) else {}
    seen.watch(list(parameters.values()), list(banks.values()))


def _tell(sentences: Iterable[str], told: set[str]) -> None:
    """Warns of what was not said before."""
    for sentence in sentences:
        if sentence not in told:
            told.add(sentence)
            warnings.warn(sentence, stacklevel=2)


def _check_parts(optimizer: Optimizer, weights: list[Weight], told: set[str]) -> None:
    """Checks that an optimizer which holds a part's own parameters holds its banks, too, or that another optimizer does."""
    held = held_by(optimizer)
    training = _training()
    _tell(of_a_frozen_owner(held), told)
    _tell(of_a_frozen_bank(weights, held), told)
    if not training:
        return
    _require_sharding(held)
    _tell(of_a_bias_that_trains_again(held), told)
    _tell(of_frozen_parts(training, held), told)
    _tell(of_frozen_that_change(training, held), told)
    _tell(of_left_out(optimizer, weights, training, held), told)
    _tell(of_learning_rates(optimizer, weights, training), told)
    note_two_optimizers(optimizer, training, held)
    untrained = _untrained(optimizer, training, held)
    _require_banks(optimizer, held, untrained)
    _tell(of_an_empty_group(optimizer, held, training, untrained), told)


def _untrained(optimizer: Optimizer, training: dict[Any, set[int]], held: dict[int, Tensor]) -> dict[Any, set[int]]:
    """The part of `training` that is in no optimizer.

    All objects of the process are searched only if a bank that trains is in another optimizer or in none.
    """
    missing = {source for source in training if not holds(held, source)}
    for thing in gc.get_objects() if missing else ():
        if is_a(thing, Optimizer) and thing is not optimizer:
            others = held_by(thing)
            missing = {source for source in missing if not holds(others, source)}
    return {source: training[source] for source in missing}


def _require_banks(optimizer: Optimizer, held: dict[int, Tensor], untrained: dict[Any, set[int]]) -> None:
    """Raises an error if the optimizer holds all own parameters of a part, and nobody trains its banks."""
    objects = gc.get_objects() if untrained else ()
    modules = [thing for thing in objects if is_a(thing, nn.Module) and "_modules" in thing.__dict__]
    found = [(part, own, names) for part in modules for own, names in _lacks(part, held, untrained)]
    if not found:
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
