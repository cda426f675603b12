"""The training loop: from a recipe to a trained model, its metrics, its checkpoints and its account of bytes.

A step depends only on the recipe, the step's number, the rank and the parameters: batches are a function of the step,
and torch's generators are seeded again in each step. So a resumed run computes the same values as an uninterrupted one,
without a saved generator state. The host waits for the device only at log points, evaluations and checkpoints.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.comm import CommMeter
from dist_ssn.engines import Engine, World, check_equal, engine_class, init_world
from dist_ssn.engines.world.heartbeat import Heartbeat
from dist_ssn.errors import Preempted, UserError
from dist_ssn.files import write_whole
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.sync.local_updates import LocalUpdates
from dist_ssn.tracking import Console, Trackers, build_tracker, check_wandb, jsonable, set_aside
from dist_ssn.tracking.wandb_settings import Draw
from dist_ssn.train import run_lock
from dist_ssn.train.build import build
from dist_ssn.train.checkpoint.saver import Saver, last_checkpoint
from dist_ssn.train.evaluate import evaluate
from dist_ssn.train.limit import within_limit
from dist_ssn.train.losses import Losses
from dist_ssn.train.metrics.account import Account
from dist_ssn.train.metrics.clock import Clock
from dist_ssn.train.metrics.predicted import comparison, prediction_of
from dist_ssn.train.metrics.rounds import Rounds
from dist_ssn.train.optim import build_optimizer, build_schedule, fast_forward, learning_rate_factor, state_bytes
from dist_ssn.train.prune import Pruner, with_thresholds
from dist_ssn.train.ranks.raise_together import raise_together
from dist_ssn.train.ranks.stop import Stop
from dist_ssn.train.ranks.threads import processor_threads
from dist_ssn.train.recipe.check import validate
from dist_ssn.train.recipe.schema import DENSE, Recipe
from dist_ssn.train.recipe.sections import ENGINE_OPTIONS
from dist_ssn.train.teacher import Teacher, dense_twin, load_teacher

LOG_EVERY = 50  # steps between two reads of the training loss, if no evaluation or checkpoint comes first
PATIENCE_SECONDS = 20  # the longest that a failed rank waits for the others before it ends
BAR_SECONDS = 0.2  # between two updates of the progress bar
T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Args:
        row: a line of the table that compares runs: name, parameters, optimizer_bytes, bytes_per_step_logical,
            bytes_per_step_ring, total_bytes (ring), ms_per_step, validation_loss (nats), validation_accuracy (of
            classification), and history: a dict with step, ring_bytes, seconds, validation_loss … per evaluation.
        folder: contains summary.json, metrics.jsonl, plan.json, recipe.json and checkpoints/.
        summary: the content of summary.json.
        model: the trained model, on the device it was trained on.
    """

    row: dict[str, Any]
    folder: Path
    summary: dict[str, Any] = field(repr=False)
    model: nn.Module = field(repr=False)


def train(recipe: Recipe, *, progress: bool = True, draw: Draw | None = None) -> RunResult:
    """Trains a recipe, in one process or on all ranks that torchrun started.

    Args:
        recipe: the recipe.
        progress: show a bar (on a terminal) or one line per evaluation (elsewhere), on rank 0.
        draw: draws the pictures that W&B gets at the end (`dist_ssn.report.draw`); None: no pictures.

    Raises:
        UserError: the recipe, the data, a checkpoint or the model is not usable, or the loss is no longer finite.
            Every rank raises it.
        Preempted: SIGTERM or SIGUSR1 preempted the run, before its first step or with a checkpoint of its last step. Every rank
            raises it.
        RanksLost: a collective failed, because another rank is gone.
    """
    recipe, notes = within_limit(recipe)
    with init_world(recipe.engine.timeout_seconds) as world:
        if recipe.distill.teacher == DENSE:
            validate(recipe, world.world_size)  # before a teacher is trained for nothing
            _train(dense_twin(recipe), world, progress, draw)
        return _train(recipe, world, progress, draw, notes)


def _train(recipe: Recipe, world: World, progress: bool, draw: Draw | None, notes: Sequence[str] = ()) -> RunResult:
    seconds = recipe.engine.timeout_seconds
    with (
        processor_threads(recipe.threads),
        CommMeter() as meter,
        Heartbeat(world, seconds) as heartbeat,
        Stop(seconds, lambda why: f"{heartbeat.missing(why)}; {last_checkpoint(recipe)}") as stop,
    ):
        run = _Run(recipe, world, meter, heartbeat, Saver(recipe, world, stop), progress, draw, notes)
        row = None
        with heartbeat.explaining_failures(run.saver.resume_point):
            try:
                run.prepare()
                run.train()
                result = run.finish()
                row = result.row
                return result
            finally:
                run.close(row)


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        world: World,
        meter: CommMeter,
        heartbeat: Heartbeat,
        saver: Saver,
        progress: bool,
        draw: Draw | None,
        notes: Sequence[str],
    ) -> None:
        self.recipe, self.world, self.meter, self.heartbeat, self.saver = recipe, world, meter, heartbeat, saver
        self.progress, self.draw = progress and world.rank == 0, draw
        self.console: Console | None = None
        self.tracker = Trackers([])
        self.folder = Path(recipe.output) / recipe.name
        self.clock = Clock(world.device)
        self.account = Account(meter, self.clock)
        self.losses = Losses(world.device, apart=recipe.sync.every is not None)
        self.teacher: Teacher | None = None
        self.pruner: Pruner | None = None
        self.local: LocalUpdates | None = None
        self.resumed_step: int | None = None
        self.prediction = prediction_of(recipe)
        self.next_show = 0.0
        self.notes: list[str] = []  # messages to the user before the first step
        self.settings = list(notes)  # what was chosen for the user, which the summary keeps too

    # ------------------------------------------------------------ before the first step

    def prepare(self) -> None:
        """Checks and builds everything; a mistake on one rank stops all ranks."""
        recipe = self.recipe
        engine = self._agree(lambda: engine_class(recipe.engine.name))
        self.task, model = self._begin(lambda: build(recipe, self.world))
        if recipe.distill.teacher is not None:
            self.teacher = self._begin(lambda: load_teacher(recipe, self.task, model))
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)  # before an engine shards them
        self.model = engine.prepare(with_thresholds(model, recipe.prune))
        self.optimizer = self._agree(lambda: build_optimizer(self.model, recipe.optimizer))
        self.schedule = self._agree(lambda: build_schedule(self.optimizer, recipe.schedule, recipe.steps))
        self.engine: Engine = engine(
            self.model,
            self.optimizer,
            scheduler=self.schedule,
            clip_norm=recipe.clip_norm,
            **{name: getattr(recipe.engine, name) for name in ENGINE_OPTIONS[recipe.engine.name]},
            **_sync_options(recipe),
        )
        self.local = self.engine.local
        self.rounds = Rounds(self.local)
        resumes = self.saver.resumes()
        if resumes:
            self.resumed_step, self.notes = self.saver.resume(self.engine, shared_plan(self.model), self.account)
            if self.resumed_step is not None:
                fast_forward(self.schedule, self.resumed_step)
        if recipe.prune.final:
            step, steps = self.account.counters.step, recipe.steps
            self.pruner = Pruner(recipe.prune, recipe.share, self.engine.module, step, steps)
        self._agree(lambda: self._open_folder(resumes))

    def _begin(self, action: Callable[[], T]) -> T:
        """Runs `action`, which may read from a slow drive; a signal ends it."""

        def run() -> T:
            with self.saver.stop.at_once():
                return action()

        return self._agree(run)

    def _open_folder(self, resumes: bool) -> None:
        if self.world.rank != 0:
            return
        plan = shared_plan(self.model)
        check_wandb(self.recipe.wandb)  # before anything is moved
        try:
            if self.folder.is_dir():
                run_lock.lock(self.folder)  # nobody trains into it now
                run_lock.unlock(self.folder)
            if not resumes and (aside := set_aside(self.folder)) is not None:
                self.notes.append(f"{self.folder} held another run, which is in {aside} now")
            self.folder.mkdir(parents=True, exist_ok=True)
            run_lock.lock(self.folder)
            (self.folder / "recipe.json").write_text(self.recipe.to_json() + "\n", encoding="utf-8")
            if plan is not None:
                (self.folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to the run's folder {self.folder}: {error}; give another output") from error
        if self.progress:
            self.console = Console(self.recipe.name, self.recipe.steps, self.folder)
            for note in (*self.settings, *self.notes):
                self.console.note(f"{self.recipe.name}: {note}")
        self.tracker = build_tracker(
            self.recipe.wandb,
            self.folder,
            name=self.recipe.name,
            recipe=json.loads(self.recipe.to_json()),
            console=self.console,
            resume_step=self.resumed_step,
            draw=self.draw,
        )
        if plan is not None:
            self.tracker.table("plan", plan.rows())

    # ------------------------------------------------------------ steps

    def train(self) -> None:
        """Trains until the last step, or until `patience` evaluations in a row have not improved."""
        recipe, counters = self.recipe, self.account.counters
        self.model.train()
        first = counters.step
        seen = 0  # number of step times that were logged
        while counters.step < recipe.steps and not self._out_of_patience():
            with self.clock.step():
                loss = self._step(counters.step)
                if counters.step + 1 == recipe.steps:
                    self.engine.synchronize()  # the last round may be a short one
            counters.step += 1
            self.heartbeat.step = counters.step
            if counters.step == first + 1:
                self.saver.stop.begun = True
                self.account.first_step_is_over()
            self._show(loss, counters.step - first)
            wants = self.saver.after_step(counters.step)
            evaluate = counters.step % recipe.evaluate_every == 0 or counters.step == recipe.steps
            if evaluate or wants.save or counters.step % LOG_EVERY == 0:
                self._log(seen, evaluate)
                seen = len(self.clock.times)
            if wants.save:
                self.saver.save(self.engine, shared_plan(self.model), self.account)
            if wants.stop and counters.step < recipe.steps:
                self.saver.preempt(wants.stop, counters.step)

    def _step(self, step: int) -> Tensor:
        recipe, world = self.recipe, self.world
        state = np.random.SeedSequence((recipe.seed, step, world.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        total = torch.zeros((), device=world.device)
        for micro in range(recipe.accumulation):
            batch = self.task.batch(step, recipe.batch_size, world.rank, world.world_size, recipe.accumulation, micro)
            inputs, targets = (part.to(world.device, non_blocking=True) for part in batch)
            last = micro == recipe.accumulation - 1
            with self.engine.accumulating(last):
                with self._autocast():
                    outputs = self.engine.model(inputs)
                    loss = self.task.loss(outputs, targets)
                    if self.teacher is not None:
                        loss = self.teacher.loss(loss, outputs, inputs, targets)
                    loss = loss / recipe.accumulation
                self.engine.backward(loss, last)
            total += loss.detach()
        self._compare(step + 1)
        self.engine.step()
        if self.pruner is not None:
            self.pruner.after_step(step + 1)
        self.losses.add(step, total)
        return total

    def _compare(self, step: int) -> None:
        """Compares parameters over all ranks, before the update: an engine that gathers them again would hide a difference."""
        every = self.recipe.engine.compare_every
        if not every or step % every or not self.engine.replicated:
            return
        try:
            check_equal(self.engine.module, step - 1)
        except UserError as error:
            self._stop(str(error))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def _show(self, loss: Tensor, steps: int) -> None:
        """Moves the progress bar, at most once per BAR_SECONDS, because reading the loss makes the host wait."""
        console = self.console
        if console is None or not console.live or time.perf_counter() < self.next_show:
            return
        self.next_show = time.perf_counter() + BAR_SECONDS
        self.clock.settle()
        seconds = statistics.median(self.clock.times[-20:])
        mb_per_step = self.account.step_bytes()[1] / steps / 1e6
        console.advance(self.account.counters.step, loss.item(), self.recipe.batch_size / seconds, mb_per_step)

    def _out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.account.counters.stale >= self.recipe.patience

    # ------------------------------------------------------------ between steps

    def _log(self, seen: int, evaluate: bool) -> None:
        recipe, counters = self.recipe, self.account.counters
        with self.meter.purpose("metrics"):
            mean, first_bad = self.losses.take(self.world.world_size)
        if first_bad is not None:
            self._stop(
                f"the run {recipe.name} was stopped: its training loss became {mean} in step {first_bad + 1}; try a lower "
                f"optimizer.lr than {recipe.optimizer.lr:g}, a warm-up or a clip_norm"
            )
        self.clock.settle()
        times = self.clock.times[seen:]
        counters.seconds += sum(times)
        values: dict[str, Any] = {
            "train_loss": mean,
            "learning_rate": recipe.optimizer.lr
            * learning_rate_factor(recipe.schedule, counters.step - 1, recipe.steps),
            "samples_per_second": recipe.batch_size * len(times) / sum(times),
            "seconds": counters.seconds,
        }
        if evaluate:
            values |= self._evaluate()
        values["ring_bytes"] = self.account.ring_bytes()
        values["exposed_seconds"] = self.account.exposed_seconds()
        if self.local is not None:
            values |= {**self.rounds.since_log(), "waiting": self.account.waiting()}
        if evaluate:
            kept = ("seconds", "ring_bytes", *(key for key in values if key.startswith("validation_")))
            counters.history.append({"step": counters.step, **{key: values[key] for key in kept}})
        self._agree(lambda: self.tracker.log(counters.step, values), "metrics")

    def _stop(self, sentence: str) -> NoReturn:
        """Ends the run on all ranks, which all call it; rank 0 knows the last checkpoint."""

        def fail() -> None:
            if self.world.rank == 0:
                raise UserError(f"{sentence}; {self.saver.resume_point()}")

        self._agree(fail)
        raise AssertionError("rank 0 has raised, and all with it")

    def _evaluate(self) -> dict[str, float]:
        with self.engine.common():
            means = evaluate(self.engine.module, self.task, self.recipe, self.world, self.meter, self._autocast())
        counters, loss = self.account.counters, means["validation_loss"]
        improved = counters.best is None or loss < counters.best
        counters.best = loss if improved else counters.best
        counters.stale = 0 if improved else counters.stale + 1
        return means

    # ------------------------------------------------------------ the end

    def finish(self) -> RunResult:
        """Writes the last checkpoint and `summary.json`, and returns the result."""
        if self.teacher is not None:
            self.teacher.leave()
        counters = self.account.counters
        if self.engine.synchronize() and counters.history and counters.history[-1]["step"] == counters.step:
            counters.history.pop()  # the run ends in a round, because of `patience`
        if not counters.history or counters.history[-1]["step"] != counters.step:  # it resumed at its last step
            so_far = {"step": counters.step, "seconds": counters.seconds, "ring_bytes": self.account.ring_bytes()}
            counters.history.append({**so_far, **self._evaluate()})
        self.saver.save(self.engine, shared_plan(self.model), self.account)
        self.saver.finish(counters.step)
        row: dict[str, Any] = {
            "name": self.recipe.name,
            "parameters": self.parameters,
            "optimizer_bytes": state_bytes(self.optimizer),
            **self.account.per_step(),
            **self._of_rounds(),
            "total_bytes": self.account.ring_bytes(),
            **{key: value for key, value in counters.history[-1].items() if key.startswith("validation_")},
            "history": counters.history,
        }
        pruned = None if self.pruner is None else self.pruner.counts()
        if pruned is not None:
            row["kept_numbers"] = pruned["kept"]
        summary = {**self.account.summary(row, self.recipe, self.world), "pruned": pruned, "chosen": self.settings}
        if rounds := self.rounds.rows():
            summary["rounds"] = rounds
        if self.prediction is not None:
            summary["prediction"] = comparison(self.prediction, {**row, **self.account.exposed_per_step()})

        def write() -> None:
            if self.world.rank == 0:
                self.tracker.table("ledger", summary["ledger"])
                if rounds:
                    self.tracker.table("rounds", rounds)
                if self.prediction is not None:
                    self.tracker.table("prediction", summary["prediction"])
                write_whole(
                    self.folder / "summary.json", json.dumps(jsonable(summary), indent=1, allow_nan=False) + "\n"
                )

        self._agree(write)
        return RunResult(row, self.folder, summary, self.model)

    def _of_rounds(self) -> dict[str, Any]:
        """Figures of local updates for the run's row; empty without them."""
        if self.local is None or not self.clock.times:
            return {}
        return {**self.rounds.figures(), "waiting": self.account.waiting(), "ms_per_step": 1000 * self.clock.mean()}

    def close(self, row: dict[str, Any] | None) -> None:
        """Ends tracking and local updates. After a failure (`row` is None), the other ranks wait until rank 0 has done so.

        A launcher kills all processes as soon as one has ended with an error, possibly before rank 0 has printed the reason.
        """
        self.tracker.close(row)
        run_lock.unlock(self.folder)
        if self.local is not None:
            self.local.close()
        if row is None and self.world.world_size > 1 and isinstance(sys.exc_info()[1], UserError | Preempted):
            waiting = dist.barrier(async_op=True)
            # Every rank raises the same error; if one has died nonetheless, the others end without it.
            with suppress(RuntimeError):
                assert waiting is not None
                waiting.wait(timedelta(seconds=PATIENCE_SECONDS))

    def _agree(self, action: Callable[[], T], purpose: str = "other") -> T:
        with self.meter.purpose(purpose):
            return raise_together(action, self.world.device)


def _sync_options(recipe: Recipe) -> dict[str, Any]:
    """Options of the engine for local updates; empty without them."""
    sync = recipe.sync.options()
    if sync is None:
        return {}
    return {"sync": sync} if recipe.sync.within is None else {"sync": sync, "within": recipe.sync.within}
