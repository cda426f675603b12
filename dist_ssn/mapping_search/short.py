"""Short runs: a few training steps on a plan, without folder, checkpoints or trackers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.engines import World, engine_class
from dist_ssn.plan import Plan


class Job(Protocol):
    """Subject of a search: the model, data and optimizer of a recipe (recipe_job.py) or of the caller (own_job.py)."""

    seed: int
    """Of the random numbers of each step, such as those of dropout."""
    steps: int
    """Length of the longest run."""
    accumulation: int
    """Micro-batches of a step."""
    clip_norm: float | None
    """See `Engine`."""

    def make(self, plan: Plan | None, steps: int) -> tuple[nn.Module, Optimizer, LRScheduler | None]:
        """A new model in training, the same each time, with optimizer and schedule of a run of `steps` steps.

        Args:
            plan: of the shared model; None: dense.
            steps: length of the schedule.
        """
        ...

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """This rank's part of the loss of a step's micro-batch, divided by the number of micro-batches."""
        ...

    def validation_loss(self, model: nn.Module) -> float:
        """Mean loss over held-out batches and all ranks."""
        ...


class ShortRun:
    """A model, trained on all ranks by DDP.

    Args:
        job: gives model, data, optimizer and schedule.
        world: this process among the job's.
        plan: of the shared model; None: dense.
        steps: length of the schedule.
    """

    def __init__(self, job: Job, world: World, plan: Plan | None, steps: int):
        self.job, self.world, self.steps = job, world, steps
        self.model, self.optimizer, schedule = job.make(plan, steps)
        self.engine = engine_class("ddp")(self.model, self.optimizer, scheduler=schedule, clip_norm=job.clip_norm)
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
        state = np.random.SeedSequence((self.job.seed, self.done, self.world.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        for micro in range(self.job.accumulation):
            last = micro == self.job.accumulation - 1
            with self.engine.accumulating(last):
                self.engine.backward(self.loss(self.engine.model, self.done, micro), last)
        self.engine.step()
        self.done += 1

    def loss(self, model: nn.Module, step: int, micro: int = 0) -> Tensor:
        """This rank's part of a step's loss."""
        return self.job.loss(model, step, micro)

    def validation_loss(self) -> float:
        """Validation loss, the mean over all ranks; not finite if training has diverged."""
        return self.job.validation_loss(self.model)
