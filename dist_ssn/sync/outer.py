"""Outer optimizers: what becomes of the workers' mean change. They train the anchor, whose gradient the mean change is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from dist_ssn.errors import UserError, describe, unknown_choice

Factory = Callable[[Sequence[Tensor]], Optimizer]
"""Makes an outer optimizer over the anchor's flat tensors."""


def _nesterov(anchor: Sequence[Tensor], rate: float | None, momentum: float | None) -> Optimizer:
    """DiLoCo's (Douillard et al. 2023, arXiv 2311.08105, at 0.7 and 0.9)."""
    momentum = 0.6 if momentum is None else momentum
    return SGD(anchor, lr=0.7 if rate is None else rate, momentum=momentum, nesterov=momentum > 0)


def _average(anchor: Sequence[Tensor], rate: float | None, momentum: float | None) -> Optimizer:
    """Post-local SGD's (Lin et al. 2018, arXiv 1808.07217) at rate 1: all go on from the mean of their parameters."""
    return SGD(anchor, lr=1.0 if rate is None else rate)


OUTER: dict[str, Callable[[Sequence[Tensor], float | None, float | None], Optimizer]] = {
    "average": _average,
    "nesterov": _nesterov,
}


def check_outer(outer: str | Optimizer | Factory, rate: float | None, momentum: float | None) -> None:
    """Checks the settings of an outer optimizer.

    Raises:
        UserError: the name is unknown, a number is out of its bounds, or a setting goes with another outer optimizer.
    """
    if isinstance(outer, str) and outer not in OUTER:
        raise UserError(unknown_choice("outer optimizer", outer, OUTER))
    if not isinstance(outer, str | Optimizer) and not callable(outer):
        raise UserError(
            f"outer must be {' or '.join(map(repr, sorted(OUTER)))}, a torch optimizer, or a function that makes one from a list "
            f"of tensors, got {outer!r}"
        )
    if isinstance(outer, Optimizer) and len(outer.param_groups) > 1:
        raise UserError(
            f"outer is an optimizer ({type(outer).__name__}) with {len(outer.param_groups)} parameter groups: the anchor is one, "
            "so give an optimizer with one group, or a function that makes an optimizer from a list of tensors"
        )
    for name, value, good, bounds in (
        ("outer_rate", rate, lambda x: 0 < x < float("inf"), "above 0"),
        ("outer_momentum", momentum, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
            raise UserError(f"{name} must be a number {bounds}, or None for the default, got {value!r}")
        if not isinstance(outer, str):
            raise UserError(
                f"{name} goes with outer 'nesterov' or 'average': an optimizer of your own has its own settings"
            )
    if momentum is not None and outer == "average":
        raise UserError("outer_momentum goes with outer 'nesterov', not with 'average'")


def outer_optimizer(
    outer: str | Optimizer | Factory, anchor: Sequence[Tensor], rate: float | None, momentum: float | None
) -> Optimizer:
    """The outer optimizer over the anchor.

    Args:
        outer: a key of `OUTER`; a torch optimizer over anything, whose class and settings are taken; or a function that makes one.
        anchor: flat tensors.
        rate: learning rate of a named one; None for its default.
        momentum: of "nesterov"; None for its default.

    Raises:
        UserError: the function has failed, or made something else than an optimizer over these tensors, or one that needs a
            closure.
    """
    if isinstance(outer, str):
        return OUTER[outer](anchor, rate, momentum)
    if isinstance(outer, Optimizer):
        kind: Any = type(outer)
        taken = inspect.signature(kind).parameters  # AdamW's defaults have more
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        settings = {
            key: value
            for key, value in outer.param_groups[0].items()
            if key in outer.defaults and (takes_all or key in taken)
        }
        made = _made_by(lambda tensors: kind(tensors, **settings), anchor)
    else:
        made = _made_by(outer, anchor)
    held = [p for group in made.param_groups for p in group["params"]] if isinstance(made, Optimizer) else []
    if not isinstance(made, Optimizer) or {id(p) for p in held} != {id(p) for p in anchor}:
        raise UserError(
            f"outer made {type(made).__name__}, and must make a torch optimizer over the list of tensors that it is given"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"outer made {type(made).__name__}, whose step needs a closure: the anchor has a gradient and no loss, so give an "
            "optimizer that takes steps without one"
        )
    return made


def _made_by(factory: Factory, anchor: Sequence[Tensor]) -> Optimizer:
    try:
        return factory(anchor)
    except Exception as error:
        raise UserError(
            f"what LocalUpdates got as outer makes no optimizer of the anchor: {describe(error)}"
        ) from error
