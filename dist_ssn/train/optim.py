"""Optimizer and learning-rate schedule from a recipe; a schedule is a pure function of the step and has no state."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dist_ssn.errors import RecipeError
from dist_ssn.sharing.optimizer_groups import parameter_groups

if TYPE_CHECKING:
    from dist_ssn.train.recipe.sections import OptimizerConfig, ScheduleConfig


def _adamw(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    param_groups = parameter_groups(model, config.weight_decay, lr=config.lr)
    return AdamW(param_groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), weight_decay=config.weight_decay)


def _sgd(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    param_groups = parameter_groups(model, config.weight_decay)
    nesterov = config.nesterov and config.momentum > 0
    return SGD(
        param_groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, weight_decay=config.weight_decay
    )


def _constant(progress: float, step: int, config: ScheduleConfig) -> float:
    return 1.0


def _cosine(progress: float, step: int, config: ScheduleConfig) -> float:
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))


def _step(progress: float, step: int, config: ScheduleConfig) -> float:
    return config.gamma ** bisect.bisect_right(sorted(config.milestones), step)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig], Optimizer]] = {"adamw": _adamw, "sgd": _sgd}

# Each takes the completed fraction of the run (0 to 1, counted from the end of the warm-up), the step, and the config.
SCHEDULES: dict[str, Callable[[float, int, ScheduleConfig], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": _step,
}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The recipe's optimizer over the trainable parameters of `model`, shared or dense, with weight decay by parameter group."""
    return OPTIMIZERS[config.name](model, config)


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`, divided by the optimizer's `lr`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return SCHEDULES[config.name](progress, step, config)


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LambdaLR:
    """The recipe's schedule for a run of `steps` steps.

    Raises:
        RecipeError: the warm-up is longer than the run.
    """
    if not 0 <= config.warmup <= steps:
        raise RecipeError(
            f"schedule.warmup is {config.warmup} steps: it must lie between 0 and the run's {steps} steps"
        )
    return LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, steps))


def fast_forward(schedule: LambdaLR, step: int) -> None:
    """Sets a new schedule and its optimizer's learning rates to their values after `step` optimizer steps."""
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict(
        {
            "last_epoch": step,
            "_step_count": step + 1,
            "_last_lr": rates,
            "lr_lambdas": [None] * len(rates),
        }
    )
    for param_group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        param_group["lr"] = rate


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's tensors on this rank."""
    states = (value for state in optimizer.state.values() for value in state.values())
    tensors = (value.to_local() if isinstance(value, DTensor) else value for value in states)
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))
