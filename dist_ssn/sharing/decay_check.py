"""A check before an optimizer's first step: the common rule "tensors of two dimensions decay" leaves a bank, which is flat, out."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_banks: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
"""Optimizers that have taken a step, with their number of parameter groups then."""


def watch_decay(banks: Iterable[nn.Module]) -> None:
    """Has `decay_warning` checked for these banks before an optimizer's first step."""
    _banks.update(banks)
    _register()


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, _: Any, __: Any) -> None:
    if torch.compiler.is_compiling() or _checked.get(optimizer) == len(optimizer.param_groups):
        return
    _checked[optimizer] = len(optimizer.param_groups)
    if (message := decay_warning(optimizer, _banks)) is not None:
        warnings.warn(message, stacklevel=3)


def decay_warning(optimizer: torch.optim.Optimizer, banks: Iterable[nn.Module]) -> str | None:
    """The warning for an optimizer in which a trainable bank does not decay and another group does; None if there is no such bank.

    Args:
        optimizer: any; a group of it may be empty.
        banks: of any models.
    """
    if not any(group.get("weight_decay") for group in optimizer.param_groups):
        return None
    still = {id(p) for group in optimizer.param_groups if not group.get("weight_decay") for p in group["params"]}
    for bank in banks:
        parameter: Any = bank.bank
        if id(parameter) in still and parameter.requires_grad:
            return (
                f"the bank of {bank.weight_name(0)} has weight_decay 0 in this {type(optimizer).__name__}, and other groups decay: "  # type: ignore[operator]
                "a bank is flat, so a rule by the number of dimensions leaves it out; make the groups by "
                "dist_ssn.parameter_groups(model, weight_decay=...)"
            )
    return None
