"""Short runs: the first steps of `train`, without folder, checkpoints or trackers, and with the schedule squeezed to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dist_ssn.comm import CommMeter
from dist_ssn.engines import World, engine_class
from dist_ssn.plan import Plan
from dist_ssn.sharing.attach import share
from dist_ssn.train.build import build
from dist_ssn.train.evaluate import evaluate
from dist_ssn.train.optim import build_optimizer, build_schedule
from dist_ssn.train.recipe.schema import EngineConfig, Recipe, ScheduleConfig, ShareConfig


def squeezed(recipe: Recipe, steps: int) -> Recipe:
    """The recipe for a run of so many steps: warm-up and milestones keep their places in it. DDP trains, whatever the engine."""
    schedule = recipe.schedule
    part = steps / recipe.steps
    milestones = sorted({max(1, round(part * milestone)) for milestone in schedule.milestones})
    shorter: ScheduleConfig = dataclasses.replace(
        schedule, warmup=min(steps, math.ceil(part * schedule.warmup)), milestones=tuple(milestones)
    )
    return dataclasses.replace(recipe, steps=steps, schedule=shorter, engine=EngineConfig())


class ShortRun:
    """A model that follows `plan` (None: dense), trained on all ranks by DDP.

    Args:
        steps: the length of the run that the schedule is made for.
    """

    def __init__(self, recipe: Recipe, world: World, plan: Plan | None, steps: int):
        self.world, self.recipe = world, squeezed(recipe, steps)
        self.task, self.model = build(dataclasses.replace(self.recipe, share=ShareConfig()), world)
        if plan is not None:
            share(self.model, plan=plan)
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.recipe.optimizer)
        schedule = build_schedule(self.optimizer, self.recipe.schedule, steps)
        self.engine = engine_class("ddp")(
            self.model, self.optimizer, scheduler=schedule, clip_norm=self.recipe.clip_norm
        )
        self.done = 0

    def run(self, steps: int, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Makes so many steps; False where `go_on`, asked before each, ended it early."""
        for _ in range(steps):
            if not go_on():
                return False
            self.step()
        return True

    def step(self) -> None:
        """One optimizer step, with the batch and the random numbers that `train` has in it."""
        state = np.random.SeedSequence((self.recipe.seed, self.done, self.world.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        for micro in range(self.recipe.accumulation):
            last = micro == self.recipe.accumulation - 1
            with self.engine.accumulating(last):
                self.engine.backward(self.loss(self.engine.model, self.done, micro), last)
        self.engine.step()
        self.done += 1

    def loss(self, model: nn.Module, step: int, micro: int = 0) -> Tensor:
        """This rank's part of a step's loss."""
        recipe, world = self.recipe, self.world
        batch = self.task.batch(step, recipe.batch_size, world.rank, world.world_size, recipe.accumulation, micro)
        inputs, targets = (part.to(world.device) for part in batch)
        with self._autocast():
            return self.task.loss(model(inputs), targets) / recipe.accumulation

    def validation_loss(self) -> float:
        """Nats, the mean over all ranks; infinite where training has diverged."""
        with CommMeter() as meter:
            means = evaluate(self.model, self.task, self.recipe, self.world, meter, self._autocast())
        found = means["validation_loss"]
        return found if math.isfinite(found) else math.inf

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
