"""Attributes and hooks that a weight had before it was shared, such as `weight.lr_scale` or `weight._no_weight_decay`.

Whoever reads them finds a bank among the parameters instead. So a bank gets those that all of its weights have alike, and a warning
names the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dist_ssn.sharing.parts import listed
from dist_ssn.sharing.read_only import OF_FRAMEWORKS
from dist_ssn.torch_private import hooks_of


def carry_attributes(weights: Mapping[str, nn.Parameter], bank: nn.Module) -> None:
    """Gives a bank's parameters the attributes that all weights of the bank have alike, and warns of others and of hooks.

    Args:
        weights: the parameters that the bank replaces, by name.
        bank: its own parameters are changed.
    """
    found = {name: _attributes_of(weight) for name, weight in weights.items()}
    lost: dict[str, Sequence[str]] = {}
    for key in dict.fromkeys(key for own in found.values() for key in own):
        having = [name for name, own in found.items() if key in own]
        values = [found[name][key] for name in having]
        if len(having) == len(found) and all(_same(value, values[0]) for value in values):
            for parameter in bank.parameters(recurse=False):
                setattr(parameter, key, values[0])
        else:
            lost[f"the attribute {key}"] = having
    if hooked := [name for name, weight in weights.items() if hooks_of(weight)]:
        lost["a hook for its gradient"] = hooked
    for what, names in lost.items():
        warnings.warn(
            f"{what} of {listed(names)} is lost, since a bank takes the place of these weights and of others: keep them dense "
            "(exclude=), or give those with the same attributes a bank of their own (mapping=)",
            stacklevel=4,
        )


def _attributes_of(weight: nn.Parameter) -> dict[str, Any]:
    return {key: value for key, value in vars(weight).items() if not key.startswith(OF_FRAMEWORKS)}


def _same(one: Any, other: Any) -> bool:
    """True if two values are equal; tensors and the like are equal to themselves only."""
    if one is other:
        return True
    equal = type(one) is type(other) and one == other
    return equal is True
