"""Parameters and optimizer state by name, as in a checkpoint, for engines whose processes hold all of them whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.engines.overlap.delay import Delay, without_delay

OptimizerState = dict[str, dict[str, Any]]
"""Name of a parameter → the optimizer's tensors and scalars for it ("exp_avg": …, "step": …)."""


def whole_state(
    model: nn.Module, optimizer: Optimizer, delay: Delay | None = None
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Parameters and optimizer state by name: the result of `Engine.gathered` with whole parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(entries) for parameter, entries in optimizer.state.items()}
    for name, entries in delay.state().items() if delay is not None else ():
        state.setdefault(name, {}).update(entries)
    return {name: parameter.detach() for parameter, name in names.items()}, state


def load_whole_state(
    model: nn.Module,
    optimizer: Optimizer,
    parameters: dict[str, Tensor],
    state: OptimizerState,
    delay: Delay | None = None,
) -> None:
    """Loads parameters and optimizer state by name: `Engine.scatter` with whole parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    if delay is not None:
        delay.load(state)
    by_index = optimizer_state_by_index(model, optimizer, state)
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})


def optimizer_state_by_index(
    model: nn.Module, optimizer: Optimizer, state: OptimizerState
) -> dict[int, dict[str, Any]]:
    """`state` by index of the parameter, as `Optimizer.load_state_dict` expects it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for param_group in optimizer.param_groups for parameter in param_group["params"]]
    known = without_delay(state)
    return {index: known[name] for index, name in enumerate(ordered) if name in known}
