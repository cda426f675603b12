"""Warnings at an optimizer's first step, where weights train, stay or change otherwise than in the dense model.

Arguments: `held` has the optimizer's parameters by id, and `training` the indices of the weights that train by their source.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.parts import frozen_by_torch, listed, reads, slots_of, told_of
from dist_ssn.sharing.plan_of import ATTRIBUTE
from dist_ssn.sharing.trained_by import checked, held_by, holds, is_a, layers, roots


def warn_of_a_frozen_bank(held: dict[int, Tensor]) -> None:
    """Warns if some layers were chosen to train by the flags of named parameters, among which their banks are not."""
    chosen, frozen = [], False
    for layer in list(layers):
        own = [p for p in layer._parameters.values() if p is not None]
        if any(p.requires_grad and id(p) in held for p in own):
            chosen += [
                source.weight_name(index)
                for source, index in slots_of(layer).values()
                if isinstance(source, Bank) and not source.bank.requires_grad and not source.frozen
            ]
        elif own and not any(p.requires_grad for p in own):
            frozen = True
    if chosen and frozen:
        warnings.warn(
            f"the bank that generates {listed(chosen)} has requires_grad=False, so these weights do not train, and the biases of "
            "their layers do: call requires_grad_(True) of the layers that shall train, or dist_ssn.freeze(model, …) for the "
            "weights that shall stay",
            stacklevel=2,
        )


def warn_of_a_frozen_owner(held: dict[int, Tensor]) -> None:
    """Warns of `model[0].requires_grad_(False)` in an `nn.Sequential`, whose first layer holds the banks of all layers."""
    for root in list(roots):
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


def warn_of_half_frozen(training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """Warns of a layer or a part of which either the weights or the other parameters are frozen."""
    for layer in list(frozen_by_torch):
        frozen = [s.weight_name(i) for s, i in slots_of(layer).values() if i in getattr(s, "frozen", ())]
        if frozen and any(id(p) in held and p.requires_grad for p in layer.parameters(recurse=False)):
            warnings.warn(
                f"requires_grad_(False) of its layer has frozen {listed(frozen)}, and its bias trains again: call "
                "requires_grad_(True) of the layer, or dist_ssn.unfreeze(model, …), if the weight shall train, too",
                stacklevel=2,
            )
    training = {source: indices for source, indices in training.items() if holds(held, source)}
    of_banks = {id(p) for source in training for p in source.parameters()}
    for root in list(roots) if training else ():
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


def warn_of_frozen_that_change(training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """Warns of frozen weights that change, because other weights train their bank."""
    moving = [
        source.weight_name(index)
        for source in training
        if isinstance(source, Bank) and holds(held, source)
        for index in source.frozen - told_of.get(source, frozenset())
    ]
    if moving:
        warnings.warn(
            f"requires_grad_(False) has frozen {listed(sorted(moving))}, but other weights train their bank and so change them: "
            "give them a bank of their own, share(model, …, mapping={'backbone.*': 'backbone', '*': 'rest'})",
            stacklevel=2,
        )


def warn_of_left_out(optimizer: Optimizer, training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """Warns of layers that are in no optimizer, as a part is that shall stay as it is, and whose weights a held bank trains."""
    holding = {source for source in training if holds(held, source)}
    left: dict[type, list[tuple[set[int], list[str]]]] = {}
    kinds: set[type] = set()
    for layer in list(layers) if holding else ():
        weights = [s.weight_name(i) for s, i in slots_of(layer).values() if s in holding and i in training[s]]
        own = {id(p) for p in layer._parameters.values() if p is not None and p.requires_grad}
        if weights and own & held.keys():
            kinds.add(type(layer))
        elif weights and own:
            left.setdefault(type(layer), []).append((own, weights))
    # Where all layers of a kind are left out, their biases are meant, as for a group without weight decay.
    candidates = [one for kind in kinds for one in left.get(kind, ())]
    if not candidates:
        return
    for thing in gc.get_objects():
        if is_a(thing, Optimizer) and thing is not optimizer:
            others = held_by(thing)
            candidates = [one for one in candidates if not one[0] & others.keys()]
    if names := sorted(name for _, weights in candidates for name in weights):
        warnings.warn(
            f"{type(optimizer).__name__} holds the bank that generates {listed(names)}, so they train, though no optimizer holds "
            "the biases of their layers: if these layers shall stay as they are, give them a bank of their own (mapping=) and "
            "dist_ssn.freeze(model, …)",
            stacklevel=2,
        )


def warn_of_two_optimizers(optimizer: Optimizer, training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """Warns of a bank in two optimizers, as of a generator and a discriminator, each of which moves the weights of both."""
    for other in list(checked):
        theirs = held_by(other)
        both = held.keys() & theirs.keys()
        common = [source for source in training if any(id(p) in both for p in source.parameters())]
        if other is optimizer or not common or held.keys() == theirs.keys():
            continue
        names = listed(common[0].weight_name(index) for index in sorted(training[common[0]]))
        warnings.warn(
            f"two optimizers hold the bank that generates {names}, so each of them moves the weights of the other's "
            "layers: give their parts banks of their own, share(model, …, mapping={'generator.*': 'generator', '*': 'rest'})",
            stacklevel=2,
        )
        return


def warn_of_learning_rates(optimizer: Optimizer, training: dict[Any, set[int]]) -> None:
    """Warns of a bank in a group with some of its layers' own parameters, where others are in groups of other learning rates."""
    rates = {
        id(p): (number, group.get("lr")) for number, group in enumerate(optimizer.param_groups) for p in group["params"]
    }
    for source in training:
        bank = next((rates[id(p)] for p in source.parameters() if id(p) in rates), None)
        if bank is None:
            continue
        beside, apart = False, []
        for layer in list(layers):
            names = [source.weight_name(index) for one, index in slots_of(layer).values() if one is source]
            own = {rates[id(p)] for p in layer._parameters.values() if id(p) in rates} if names else set()
            beside |= bank in own
            apart += names if own and all(rate != bank[1] for _, rate in own) else []
        if beside and apart:
            warnings.warn(
                f"the bank that generates {listed(sorted(apart))} is in a parameter group with the learning rate {bank[1]:g}, and "
                "the biases of these layers are in others: the weights of a bank have one learning rate, so give them "
                "a bank of their own, share(model, …, mapping={'head.*': 'head', '*': 'rest'}), and parameters_of(part) the group",
                stacklevel=2,
            )
            return
