"""Saving of a run (by steps, by the clock, on a signal), and resuming it (if asked to, or after a restart)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from dist_ssn.comm.meter import purpose
from dist_ssn.engines import Engine, World
from dist_ssn.errors import Preempted, UserError
from dist_ssn.plan import Plan
from dist_ssn.train.checkpoint import store as checkpoint
from dist_ssn.train.checkpoint.folder import checkpoints, latest
from dist_ssn.train.checkpoint.parts import clean
from dist_ssn.train.checkpoint.snapshot import NotFinite, take
from dist_ssn.train.checkpoint.writer import Writer
from dist_ssn.train.metrics.account import Account, Counters
from dist_ssn.train.ranks.agreement import Agreement, Wants
from dist_ssn.train.ranks.raise_together import raise_together
from dist_ssn.train.ranks.stop import Stop
from dist_ssn.train.recipe.schema import Recipe, changed_settings

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Environment variables in which a launcher counts its restarts of this job."""
T = TypeVar("T")


class Saver:
    """Saves and resumes a run; all ranks call each method in the same order."""

    def __init__(self, recipe: Recipe, world: World, stop: Stop) -> None:
        self._recipe, self._world, self.stop = recipe, world, stop
        self._folder = folder_of(recipe)
        self._writer = Writer(self._folder, recipe.checkpoint.keep, recipe.engine.timeout_seconds)
        if world.rank == 0:
            clean(self._folder)  # before any process writes its part: collectives lie between
        self._agreement = Agreement(world.world_size, world.device)
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None

    # ------------------------------------------------------------ going on

    def resumes(self) -> bool:
        """True if this run resumes from a checkpoint, because the recipe says so or a launcher has restarted it."""
        restarted = any(_count(os.environ, name) > 0 for name in RESTARTS)
        return self._recipe.checkpoint.resume or max(self._highest_and_lowest(int(restarted))) > 0

    def resume(self, engine: Engine, plan: Plan | None, account: Account) -> tuple[int | None, list[str]]:
        """Resumes from the newest checkpoint.

        A launcher's restart skips damaged checkpoints, because no user is there to remove them.

        Args:
            engine: takes the state.
            plan: of the model, None if it is dense.
            account: takes the counters.

        Returns:
            (step of the checkpoint, or None if there is none; messages for the user).

        Raises:
            UserError: the checkpoint cannot be loaded, or ranks find different ones. All ranks raise it.
        """
        notes: list[str] = []
        saved = self._agree(lambda: self._load(engine, plan, account, notes))
        highest, lowest = self._highest_and_lowest(account.counters.step)
        if highest != lowest:
            raise UserError(
                f"some ranks find a checkpoint of step {highest} in {self._folder.parent} and others of step {lowest}: "
                f"output must be a folder that all ranks can read and write"
            )
        if saved is None:
            return None, [f"there is no checkpoint in {self._folder}: it begins at step 0"]
        notes.append(f"goes on from {saved.path}")
        if changed := changed_settings(saved.recipe, json.loads(self._recipe.to_json())):
            notes.append(f"it goes on with other settings than before: {'; '.join(changed)}")
        self._saved_step = saved.step
        return saved.step, notes

    def _load(self, engine: Engine, plan: Plan | None, account: Account, notes: list[str]) -> checkpoint.State | None:
        found = checkpoints(self._folder)
        while found:
            try:
                saved = checkpoint.load(found[-1], engine=engine, plan=plan)
            except checkpoint.Damaged as error:
                if self._recipe.checkpoint.resume or len(found) == 1:
                    raise
                notes.append(f"{str(error).partition(';')[0]}; it is skipped, because a launcher restarted this run")
                found.pop()
                continue
            account.counters = Counters.from_json(saved.run, saved.path, saved.step)
            return saved
        return None

    def _highest_and_lowest(self, number: int) -> tuple[int, int]:
        if self._world.world_size == 1:
            return number, number
        extremes = torch.tensor([number, -number], device=self._world.device)
        with purpose("checkpoint"):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return int(extremes[0]), -int(extremes[1])

    # ------------------------------------------------------------ saving

    def after_step(self, step: int) -> Wants:
        """Actions that all ranks must take after this step: save, or save and stop.

        Raises:
            CheckpointError: a checkpoint could not be written in the background. All ranks raise it.
        """
        config = self._recipe.checkpoint
        due = config.every_seconds is not None and time.monotonic() - self._saved_at >= config.every_seconds
        mine = Wants(self.stop.number, due and self._world.rank == 0, self._writer.failure is not None)
        with purpose("checkpoint"):
            wants = self._agreement.after_step(step, mine)
        if wants.failed:
            self.wait()
        by_step = config.every is not None and step % config.every == 0
        return Wants(wants.stop, bool(by_step or wants.save or wants.stop))

    def save(self, engine: Engine, plan: Plan | None, account: Account) -> None:
        """Copies the run's state, and writes it in the background.

        Raises:
            UserError: a parameter is not finite, or the previous checkpoint could not be written. All ranks raise it.
        """
        step = account.counters.step
        if self._saved_step == step:
            return

        def begin() -> None:
            try:
                snapshot = take(
                    step=step,
                    engine=engine,
                    recipe_json=self._recipe.to_json(),
                    plan=plan,
                    run=account.to_json(),
                    base=self._recipe.checkpoint.base,
                )
            except NotFinite as error:
                raise UserError(
                    f"the run {self._recipe.name} was stopped: {error}; try a lower optimizer.lr; {self.resume_point()}"
                ) from None
            if snapshot is not None:
                self._writer.start(snapshot)

        self._agree(begin)
        self._saved_at, self._saved_step = time.monotonic(), step

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            CheckpointError: it could not be written. All ranks raise it.
        """
        self._agree(self._writer.wait)

    def finish(self, step: int) -> None:
        """Ends the run: waits for its last collective and its last checkpoint.

        Raises:
            CheckpointError: as `wait`.
        """
        with purpose("checkpoint"):
            self._agreement.answer(step)
        self.wait()

    def preempt(self, number: int, step: int) -> None:
        """Ends a run that a signal preempts, when the checkpoint of this step is written.

        Raises:
            Preempted: always, on all ranks.
        """
        self.wait()
        raise Preempted(
            f"the run {self._recipe.name} was preempted by signal {number}: it is saved after step {step}, and goes on "
            f"from {latest(self._folder)} when it is started again (with checkpoint.resume=true, or by Slurm or torchrun)"
        )

    def resume_point(self) -> str:
        """The last complete checkpoint, as a clause of a message; waits for the one that is being written, never fails."""
        self._writer.hurry()
        try:
            self._writer.wait()
        except UserError as error:
            return f"{error}; {last_checkpoint(self._recipe)}"
        return last_checkpoint(self._recipe)

    def _agree(self, action: Callable[[], T]) -> T:
        with purpose("checkpoint"):
            return raise_together(action, self._world.device)


def folder_of(recipe: Recipe) -> Path:
    """Folder of a run's checkpoints."""
    return Path(recipe.output) / recipe.name / "checkpoints"


def last_checkpoint(recipe: Recipe) -> str:
    """The last complete checkpoint, as a clause of a message; does not wait."""
    found = latest(folder_of(recipe))
    return "no checkpoint was written before" if found is None else f"the last checkpoint is {found}"


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    return int(text) if text.isdigit() else 0
