"""Short runs: the first steps of `train`, without folder, checkpoints or trackers, and with a schedule of that length."""

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


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe for a run of `steps` steps: warm-up and milestones keep their relative places, and the engine is DDP."""
    schedule = recipe.schedule
    part = steps / recipe.steps
    milestones = sorted({max(1, round(part * milestone)) for milestone in schedule.milestones})
    shorter: ScheduleConfig = dataclasses.replace(
        schedule, warmup=min(steps, math.ceil(part * schedule.warmup)), milestones=tuple(milestones)
    )
    return dataclasses.replace(recipe, steps=steps, schedule=shorter, engine=EngineConfig())


class ShortRun:
    """A model, trained on all ranks by DDP.

    Args:
        recipe: gives model, data, optimizer and schedule.
        world: this process among the job's.
        plan: of the shared model; None: dense.
        steps: length of the schedule.
    """

    def __init__(self, recipe: Recipe, world: World, plan: Plan | None, steps: int):
        self.world, self.recipe = world, shortened(recipe, steps)
        self.task, self.model = build(dataclasses.replace(self.recipe, share=ShareConfig()), world)
        if plan is not None:
            share(self.model, plan=plan, include=recipe.share.include, exclude=recipe.share.exclude)
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.recipe.optimizer)
        schedule = build_schedule(self.optimizer, self.recipe.schedule, steps)
        self.engine = engine_class("ddp")(
            self.model, self.optimizer, scheduler=schedule, clip_norm=self.recipe.clip_norm
        )
        self.done = 0

    def run(self, steps: int, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Makes `steps` steps.

        Args:
            steps: number of optimizer steps.
            go_on: called before each step; False ends the run.

        Returns:
            False if `go_on` ended the run early.
        """
        for _ in range(steps):
            if not go_on():
                return False
            self.step()
        return True

    def step(self) -> None:
        """Makes one optimizer step, with the batch and the random numbers of the same step in `train`."""
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
        """Validation loss in nats, the mean over all ranks; infinite if training has diverged."""
        with CommMeter() as meter:
            means = evaluate(self.model, self.task, self.recipe, self.world, meter, self._autocast())
        found = means["validation_loss"]
        return found if math.isfinite(found) else math.inf

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
