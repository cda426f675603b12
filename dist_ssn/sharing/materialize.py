"""`materialize`: conversion of a shared model to an ordinary dense one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bank_set import BankSet, bank_sets
from dist_ssn.sharing.generation import unwatch_forward
from dist_ssn.sharing.layers import unshare_layer
from dist_ssn.sharing.parts import outside
from dist_ssn.sharing.plan_of import ATTRIBUTE
from dist_ssn.sharing.pretrained import unguard_saving
from dist_ssn.sharing.ties import release_ties
from dist_ssn.sharing.walks import COPIED


def materialize(model: nn.Module) -> nn.Module:
    """An ordinary dense copy of a shared model or a part of it, with base classes, stored weights and the original ties.

    It has no banks. Weights that are frozen require no gradient.

    Args:
        model: a shared model, or a module of one.

    Raises:
        ShareError: the model is not shared.
    """
    banks = outside(model)
    if not bank_sets(model) and not banks:
        raise ShareError(f"{type(model).__name__} is not shared: there is nothing to materialize")
    memo: dict[Any, Any] = {id(bank): bank for bank in banks}  # the banks around a part are read, not copied
    memo[COPIED] = set(memo)
    memo |= {  # computed by a weight norm, for example: torch refuses to copy a result of an operation
        id(value): value.detach().clone()
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    dense = copy.deepcopy(model, memo)
    made: dict[tuple[int, int], nn.Parameter] = {}
    for module in list(dense.modules()):
        slots: dict[str, tuple[Bank, int]] = module.__dict__.get("_dist_ssn_slots", {})
        for bank, index in slots.values():
            if (id(bank), index) not in made:
                with torch.no_grad():
                    made[id(bank), index] = nn.Parameter(bank(index).clone(), index not in bank.frozen)
        if slots:
            unshare_layer(module, {name: made[id(bank), index] for name, (bank, index) in slots.items()})
    for module in list(dense.modules()):
        if isinstance(module._modules.get(ATTRIBUTE), BankSet):
            del module._modules[ATTRIBUTE]
    unguard_saving(dense)
    unwatch_forward(dense)
    release_ties(dense)
    return dense
