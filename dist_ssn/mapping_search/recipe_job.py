"""A recipe as the job of a search: its short runs are the first steps of `train`, with a schedule of that length."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.comm import CommMeter
from dist_ssn.engines import World
from dist_ssn.plan import Plan
from dist_ssn.sharing.attach import share
from dist_ssn.train.build import build
from dist_ssn.train.data import Task
from dist_ssn.train.evaluate import evaluate
from dist_ssn.train.optim import build_optimizer, build_schedule
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import EngineConfig, ScheduleConfig, ShareConfig


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe for a run of `steps` steps: warm-up and milestones keep their relative places, and the engine is DDP."""
    schedule = recipe.schedule
    part = steps / recipe.steps
    milestones = sorted({max(1, round(part * milestone)) for milestone in schedule.milestones})
    shorter: ScheduleConfig = dataclasses.replace(
        schedule, warmup=min(steps, math.ceil(part * schedule.warmup)), milestones=tuple(milestones)
    )
    return dataclasses.replace(recipe, steps=steps, schedule=shorter, engine=EngineConfig())


class RecipeJob:
    """A `Job` of a recipe.

    Args:
        recipe: gives model, data, optimizer and schedule.
        world: this process among the job's.
    """

    task: Task

    def __init__(self, recipe: Recipe, world: World):
        self.recipe, self.world = recipe, world
        self.seed, self.steps = recipe.seed, recipe.steps
        self.accumulation, self.clip_norm = recipe.accumulation, recipe.clip_norm

    def make(self, plan: Plan | None, steps: int) -> tuple[nn.Module, Optimizer, LRScheduler | None]:
        """See `Job`."""
        recipe = shortened(self.recipe, steps)
        self.task, model = build(dataclasses.replace(recipe, share=ShareConfig()), self.world)
        if plan is not None:
            share(model, plan=plan, include=recipe.share.include, exclude=recipe.share.exclude)
        optimizer = build_optimizer(model.train(), recipe.optimizer)
        return model, optimizer, build_schedule(optimizer, recipe.schedule, steps)

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """See `Job`."""
        recipe, world = self.recipe, self.world
        batch = self.task.batch(step, recipe.batch_size, world.rank, world.world_size, recipe.accumulation, micro)
        inputs, targets = (part.to(world.device) for part in batch)
        with self._autocast():
            return self.task.loss(model(inputs), targets) / recipe.accumulation

    def validation_loss(self, model: nn.Module) -> float:
        """See `Job`; in nats."""
        with CommMeter() as meter:
            means = evaluate(model, self.task, self.recipe, self.world, meter, self._autocast())
        return means["validation_loss"]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
