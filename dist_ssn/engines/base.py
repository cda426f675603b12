"""What a training loop needs of an engine, and no more."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.engines.overlap.delay import Delay, without_delay
from dist_ssn.errors import UserError

OptimizerState = dict[str, dict[str, Any]]
"""name of a parameter → the optimizer's tensors and plain numbers for it ("exp_avg": …, "step": …)."""


class Engine(Protocol):
    """Trains one model on several processes. Made in two stages, since some engines replace parameters::

        module = SomeEngine.prepare(share(model, 0.1))                      # in place where it can be
        optimizer = AdamW(parameter_groups(module), lr=1e-3)
        engine = SomeEngine(module, optimizer, scheduler=…, clip_norm=1.0)

    One step::

        for micro in range(accumulation):
            last = micro == accumulation - 1
            with engine.accumulating(last):
                engine.backward(loss_of(engine.model(inputs)) / accumulation, last)
        engine.step()
    """

    rank: int
    world_size: int
    module: nn.Module
    """The model itself: for evaluation, on all processes together."""
    model: nn.Module
    """What to call for a forward in training."""
    optimizer: Optimizer
    replicated: bool
    """Whether every process holds all parameters whole, so that they can be compared."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        **options: Any,
    ) -> None:
        """Each engine has options of its own. With one process, all work as if there were no engine."""
        ...

    @staticmethod
    def prepare(model: nn.Module) -> nn.Module:
        """Replaces the parameters by what the engine works on, before the optimizer is made; returns the model."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Put around forward and backward of one micro-batch: nothing is averaged unless it is the step's last."""
        ...

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Gradients of `loss`, a scalar: this process's mean, divided by the number of micro-batches."""
        ...

    def step(self) -> Tensor | None:
        """Clips by the global norm, updates parameters and learning rate, drops the gradients; returns the norm if clipping."""
        ...

    def gathered(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """The whole parameters by name, and the optimizer's state for each; all processes call, rank 0's answer counts."""
        ...

    def scatter(self, parameters: dict[str, Tensor], optimizer: OptimizerState) -> None:
        """The reverse: takes what `gathered` returned, which every process holds whole."""
        ...


def whole_state(
    model: nn.Module, optimizer: Optimizer, delay: Delay | None = None
) -> tuple[dict[str, Tensor], OptimizerState]:
    """What `Engine.gathered` returns where every process holds whole parameters."""
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
    """What `Engine.scatter` does where every process holds whole parameters."""
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
    """`state` as `Optimizer.load_state_dict` counts parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    known = without_delay(state)
    return {index: known[name] for index, name in enumerate(ordered) if name in known}


def check_optimizer(model: nn.Module, optimizer: Optimizer, clip_norm: float | None) -> None:
    """What every engine asks of its arguments.

    Raises:
        UserError: there is nothing to train, the optimizer holds parameters of another model, or clip_norm is not above 0.
    """
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError(
            f"the model ({type(model).__name__}) has no trainable parameters: requires_grad is False for all"
        )
    known = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [p for p in held if id(p) not in known]
    if strangers:
        raise UserError(
            f"the optimizer holds {len(strangers)} of {len(held)} parameters that are not the model's (the first has "
            f"the shape {tuple(strangers[0].shape)}): make the optimizer after share(), from the model it will train"
        )
    forgotten = sorted(name for key, name in trainable.items() if key not in {id(p) for p in held})
    if forgotten:
        warnings.warn(
            f"{len(forgotten)} trainable parameters are not in the optimizer (the first is {forgotten[0]}): they are "
            "sent in each step but never change; give them to the optimizer or set requires_grad to False",
            stacklevel=3,
        )
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm must be above 0 or None, got {clip_norm!r}")
