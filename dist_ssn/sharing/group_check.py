"""Check of an optimizer that another library made: does it train a shared model as `parameter_groups` would?"""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

from torch import nn

from dist_ssn.sharing.bank import banks_of
from dist_ssn.sharing.optimizer_groups import parameter_groups

_warned: weakref.WeakSet[Any] = weakref.WeakSet()
"""Optimizers of which a warning was given."""


def scales_with_uses(name: str) -> bool:
    """True for Adam and its relatives, whose steps are about as large as the learning rate.

    Args:
        name: of the optimizer's class.
    """
    return "sgd" not in name.lower()


def group_fault(model: nn.Module, optimizer: Any, lr: float | None = None, engine: bool = False) -> str | None:
    """The difference between an optimizer's groups and those of `parameter_groups`, as a clause; None if there is none.

    Args:
        model: shared or dense, wrapped or not.
        optimizer: with `param_groups`; parameters that the model doesn't have are passed over.
        lr: the dense model's learning rate. If None, only the ratios of learning rates are compared.
        engine: the optimizer is known to train the model. If it has none of its parameters, as DeepSpeed flattens them, then its
            learning rates alone are judged.
    """
    if not banks_of(model):
        return None
    wanted = {
        id(parameter): (group["lr"], group["weight_decay"] > 0)
        for group in parameter_groups(model, weight_decay=1.0, lr=1.0)
        for parameter in group["params"]
    }
    adam_like = scales_with_uses(type(_inside(optimizer)).__name__)
    is_dense = False
    of_dense = []  # the dense model's learning rate that each parameter's own stands for
    for group in optimizer.param_groups:
        own = group.get("initial_lr", group["lr"])
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                continue
            factor, decays = wanted[id(parameter)]
            if group.get("weight_decay", 0) and not decays:
                return "gains, coefficients, biases or norms decay"
            is_dense |= lr is not None and factor > 1 and math.isclose(own, lr)
            of_dense.append(own / factor)
    if engine and lr is not None and not of_dense and any(factor > 1 for factor, _ in wanted.values()):
        is_dense = all(math.isclose(group.get("initial_lr", group["lr"]), lr) for group in optimizer.param_groups)
    if adam_like and (is_dense or not all(math.isclose(x, of_dense[0], rel_tol=1e-6) for x in of_dense)):
        return "banks have the learning rate of a dense weight"
    return None


def warn_of_groups(
    model: nn.Module, optimizer: Any, remedy: str, lr: float | None = None, engine: bool = False
) -> None:
    """Warns, once for an optimizer, if its groups cost quality.

    Args:
        model: see `group_fault`.
        optimizer: see `group_fault`; None is passed over.
        remedy: what would be right, as a clause.
        lr: see `group_fault`.
        engine: see `group_fault`.
    """
    if optimizer is None or _inside(optimizer) in _warned:
        return
    if fault := group_fault(model, optimizer, lr, engine):
        _warned.add(_inside(optimizer))
        warnings.warn(f"the optimizer was made as for a dense model, and {fault}: {remedy}", stacklevel=3)


def _inside(optimizer: Any) -> Any:
    """The optimizer that Accelerate has wrapped; any other itself."""
    return getattr(optimizer, "optimizer", optimizer)
