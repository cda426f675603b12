"""Sentences for an optimizer's step, where weights train, stay or change otherwise than in the dense model.

Arguments: `weights` are those of all shared layers, `held` has the optimizer's parameters by id, and `training` the indices of the
weights that train by their source.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.beside import Weight
from dist_ssn.sharing.parts import frozen_by_torch, listed, reads, slots_of, told_of
from dist_ssn.sharing.plan_of import ATTRIBUTE
from dist_ssn.sharing.trained_by import checked, held_by, holds, is_a, roots

_BY_MAPPING = "share(model, …, mapping={'head.*': 'head', '*': 'rest'})"


def of_a_frozen_bank(weights: list[Weight], held: dict[int, Tensor]) -> Iterator[str]:
    """Some layers were chosen to train by the flags of named parameters, among which their banks are not."""
    chosen = [
        weight.name
        for weight in weights
        if isinstance(bank := weight.source, Bank) and not bank.bank.requires_grad and not bank.frozen
        if weight.own and all(p.requires_grad and id(p) in held for _, p in weight.own)
    ]
    left = any(weight.own and not any(p.requires_grad for _, p in weight.own) for weight in weights)
    if chosen and left:
        yield (
            f"the bank that generates {listed(chosen)} has requires_grad=False, so these weights do not train, and the biases or "
            "norms beside them do: call requires_grad_(True) of the layers that shall train, or dist_ssn.freeze(model, …) for the "
            "weights that shall stay"
        )


def of_a_frozen_owner(held: dict[int, Tensor]) -> Iterator[str]:
    """`model[0].requires_grad_(False)` was called in an `nn.Sequential`, whose first layer holds the banks of all layers."""
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
                yield (
                    f"the parameters of {path} are frozen, and with them the banks that it holds for the whole model, so "
                    f'{listed(others)} do not train: call requires_grad_(True) of it and dist_ssn.freeze(model, "{path}") instead'
                )


def of_a_bias_that_trains_again(held: dict[int, Tensor]) -> Iterator[str]:
    """The weight of a layer is frozen, and its bias is not any more."""
    for layer in list(frozen_by_torch):
        frozen = [s.weight_name(i) for s, i in slots_of(layer).values() if i in getattr(s, "frozen", ())]
        if frozen and any(id(p) in held and p.requires_grad for p in layer.parameters(recurse=False)):
            yield (
                f"requires_grad_(False) of its layer has frozen {listed(frozen)}, and its bias trains again: call "
                "requires_grad_(True) of the layer, or dist_ssn.unfreeze(model, …), if the weight shall train, too"
            )


def of_frozen_parts(training: dict[Any, set[int]], held: dict[int, Tensor]) -> Iterator[str]:
    """All parameters of a part are frozen, and its weights train."""
    training = {source: indices for source, indices in training.items() if holds(held, source)}
    of_banks = {id(p) for source in training for p in source.parameters()}
    for root in list(roots):
        for path, part in root.named_modules() if training.keys() & set(root.modules()) else ():
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
                yield (
                    f"the parameters of {path} are frozen, but its weights {listed(weights)} train, since their bank is outside of "
                    f'{path}: dist_ssn.freeze(model, "{path}") freezes both'
                )
                break


def of_frozen_that_change(training: dict[Any, set[int]], held: dict[int, Tensor]) -> Iterator[str]:
    """Frozen weights change, because other weights train their bank."""
    moving = [
        source.weight_name(index)
        for source in training
        if isinstance(source, Bank) and holds(held, source)
        for index in source.frozen - told_of.get(source, frozenset())
    ]
    if moving:
        yield (
            f"requires_grad_(False) has frozen {listed(sorted(moving))}, but other weights train their bank and so change them: "
            "give them a bank of their own, share(model, …, mapping={'backbone.*': 'backbone', '*': 'rest'})"
        )


def of_left_out(
    optimizer: Optimizer, weights: list[Weight], training: dict[Any, set[int]], held: dict[int, Tensor]
) -> Iterator[str]:
    """Some layers are in no optimizer, as a part is that shall stay as it is, and a held bank trains their weights."""
    holding = {source for source in training if holds(held, source)}
    trained = [
        (weight, {name: p for name, p in weight.own if p.requires_grad})
        for weight in weights
        if weight.source in holding and weight.index in training[weight.source]
    ]
    kinds = {name for _, own in trained for name, p in own.items() if id(p) in held}
    # Where all biases are left out, they are meant, and not their layers.
    kinds = kinds or {name for _, own in trained for name in own if "bias" not in name}
    left = [
        (weight.name, {id(p) for _, p in weight.own})
        for weight, own in trained
        if own.keys() & kinds and not any(id(p) in held for _, p in weight.own)
    ]
    for thing in gc.get_objects() if left else ():
        if is_a(thing, Optimizer) and thing is not optimizer:
            others = held_by(thing)
            left = [one for one in left if not one[1] & others.keys()]
    if left:
        yield (
            f"{type(optimizer).__name__} holds the bank that generates {listed(sorted(name for name, _ in left))}, so they train, "
            "though no optimizer holds the biases or norms beside them: if these layers shall stay as they are, give them a bank "
            "of their own (mapping=) and dist_ssn.freeze(model, …)"
        )


def note_two_optimizers(optimizer: Optimizer, training: dict[Any, set[int]], held: dict[int, Tensor]) -> None:
    """A bank is in two optimizers, as of a generator and a discriminator, each of which moves the weights of both.

    The other one may have taken its last step, as at the end of a phase. So it is said when that one takes another step.
    """
    for other, seen in list(checked.items()):
        theirs = held_by(other)
        both = held.keys() & theirs.keys()
        common = [source for source in training if any(id(p) in both for p in source.parameters())]
        if not common or held.keys() == theirs.keys() or _are_one(optimizer, other):
            continue
        names = listed(common[0].weight_name(index) for index in sorted(training[common[0]]))
        seen.waiting.append(
            f"two optimizers hold the bank that generates {names}, so each of them moves the weights of the other's "
            "layers: give their parts banks of their own, share(model, …, mapping={'generator.*': 'generator', '*': 'rest'})"
        )


def _are_one(one: Optimizer, other: Optimizer) -> bool:
    """True if one of two optimizers is inside the other, as in ZeroRedundancyOptimizer, or both are the same."""
    return one is other or one in _inside(other) or other in _inside(one)


def _inside(optimizer: Optimizer) -> list[Any]:
    values = [*vars(optimizer).values()]
    several = [one for value in values if isinstance(value, (list, tuple)) for one in value]
    return [value for value in (*values, *several) if is_a(value, Optimizer)]


def of_learning_rates(optimizer: Optimizer, weights: list[Weight], training: dict[Any, set[int]]) -> Iterator[str]:
    """The parameters beside the weights of one bank have several learning rates, and the bank has one."""
    rates = {id(p): _rate(group) for group in optimizer.param_groups for p in group["params"]}
    for source, indices in training.items():
        bank = next((rates[id(p)] for p in source.parameters() if id(p) in rates), None)
        if bank is None:
            continue
        here = {(source, index) for index in indices}
        mine = [(weight.name, _rates_of(weight, rates)) for weight in weights if weight[:2] in here]
        kinds: dict[str, set[float]] = {}
        for _, own in mine:
            for name, rate in own.items():
                kinds.setdefault(name, set()).add(rate)
        # All biases may have twice the learning rate of the weights: only the same kind of parameter is compared.
        several = {name for name, found in kinds.items() if len(found) > 1}
        if several:
            apart = sorted(weight for weight, own in mine if any(own.get(name, bank) != bank for name in several))
            yield (
                f"the bank that generates {listed(apart)} is in a parameter group with the learning rate {bank:g}, and "
                "the biases or norms beside these weights are in others: the weights of a bank have one learning rate, so give "
                f"them a bank of their own, {_BY_MAPPING}, and parameters_of(part) the group"
            )
            return


def _rate(group: dict[str, Any]) -> float:
    """The learning rate of a group; 0 for one that is on a GPU, which a step may not wait for."""
    lr = group.get("lr", 0.0)
    return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def _rates_of(weight: Weight, rates: dict[int, float]) -> dict[str, float]:
    """Kind of parameter beside a weight → its learning rate; nothing for a block that has several by itself."""
    found: dict[str, float] = {}
    for name, parameter in weight.own:
        rate = rates.get(id(parameter))
        if rate is not None and found.setdefault(name, rate) != rate:
            return {}
    return found


def of_an_empty_group(
    optimizer: Optimizer, held: dict[int, Tensor], training: dict[Any, set[int]], untrained: dict[Any, set[int]]
) -> Iterator[str]:
    """A group is empty, as `part.parameters()` makes it where a part has no bias and no norm.

    A rule may find nothing for a group, and that is fine. So with a held bank it is said of a learning rate of its own only.
    """
    empty = [group for group in optimizer.param_groups if not group["params"]]
    apart = any(_rate(group) != _rate(other) for group in empty for other in optimizer.param_groups)
    for root in list(roots) if empty else ():
        if not any(id(p) in held for p in root.parameters()):
            continue
        lacks = [source.weight_name(index) for source, index in reads(root) if index in untrained.get(source, ())]
        if lacks:
            yield (
                f"a parameter group of {type(optimizer).__name__} is empty, and no optimizer holds the bank that generates "
                f"{listed(lacks)}: the parameters of a part are dist_ssn.parameters_of(part)"
            )
        elif apart and any(holds(held, source) for source in {s for s, _ in reads(root)} & training.keys()):
            yield (
                f"a parameter group of {type(optimizer).__name__} with a learning rate of its own is empty, because a part without "
                f"biases and norms holds no parameter: give the part a bank of its own, {_BY_MAPPING}, and "
                "dist_ssn.parameters_of(part) the group"
            )
