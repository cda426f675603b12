"""Checks of what `LocalUpdates` is given, and what it needs to know of an optimizer."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_ssn.errors import UserError

held: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that a LocalUpdates watches."""


def check_kinds(model: object, optimizer: object) -> None:
    """Checks that a model and an optimizer are what they must be.

    Raises:
        UserError: they are something else, or are given in the other order.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
        found = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise UserError(f"LocalUpdates needs a model and a torch optimizer of it, in this order, got {found}")


def check_settings(every: object, warmup: object, delay: object, outlier: object) -> None:
    """Checks the numbers among the settings.

    Raises:
        UserError: one is out of its bounds.
    """
    check_steps("every", every, 1)
    check_steps("warmup", warmup, 0)
    if isinstance(delay, bool) or delay not in (0, 1):
        raise UserError(
            f"delay must be 0 (apply a round's mean at its end) or 1 (at the end of the next round), got {delay!r}"
        )
    if outlier is not None and (isinstance(outlier, bool) or not isinstance(outlier, int | float) or not outlier > 1):
        raise UserError(f"outlier must be a multiple of the median norm above 1, or None, got {outlier!r}")


def check_steps(name: str, value: object, least: int) -> None:
    """Checks a number of steps.

    Raises:
        UserError: it is no whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number of steps, at least {least}, got {value!r}")


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose steps are counted: inside of wrappers such as Accelerate's.

    Raises:
        UserError: another LocalUpdates watches it, or averages of its parameters are no averages of its model.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    kind = type(optimizer)
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise UserError(
            f"{kind.__name__} keeps the weights of its evaluation mode in its own state, as schedule-free optimizers do, and local "
            "updates average parameters only: use another optimizer with a schedule"
        )
    if optimizer in held:
        raise UserError(
            f"another LocalUpdates averages after the steps of this {kind.__name__} already: leave its block, or call "
            "its close(), first"
        )
    return optimizer


def taking_part(optimizer: Optimizer) -> list[tuple[int, bool, torch.Size, torch.dtype]]:
    """The optimizer's parameters, by id, whether they are trained, and their form."""
    return [(id(p), p.requires_grad, p.shape, p.dtype) for group in optimizer.param_groups for p in group["params"]]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU if there is none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def forget_what_is_not_finite(optimizer: Optimizer) -> None:
    """Drops the optimizer's state of parameters for which it is not finite: it would spoil every step from now on."""
    for parameter, entries in list(optimizer.state.items()):
        tensors = (value.to_local() if isinstance(value, DTensor) else value for value in entries.values())
        if not all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor)):
            del optimizer.state[parameter]
