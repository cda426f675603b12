"""The training loop: from a recipe to a trained model, its metrics, its checkpoints and its account of bytes.

A step depends on the recipe, the step's number, the rank and the parameters alone: batches are a function of the step,
and torch's generators are seeded anew in each step. So a resumed run goes the way that the killed one would have gone,
and needs no generator's state for it. The host waits for the device only at log points, evaluations and checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.comm import CommMeter
from dist_ssn.comm.ledger import merged_rows
from dist_ssn.engines import Engine, World, check_equal, engine_class, init_world
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.share import shared_plan
from dist_ssn.track import Console, Trackers, build_tracker, check_wandb, jsonable, set_aside, write_whole
from dist_ssn.train import checkpoint
from dist_ssn.train.build import build
from dist_ssn.train.checkpoint import NotFinite, together
from dist_ssn.train.clock import Clock
from dist_ssn.train.evaluate import evaluate
from dist_ssn.train.losses import Losses
from dist_ssn.train.optim import build_optimizer, build_schedule, fast_forward, rate_factor, state_bytes
from dist_ssn.train.recipe import ENGINE_OPTIONS, Recipe, changed_settings

LOG_EVERY = 50  # steps between two looks at the training loss, when no evaluation or checkpoint comes first
PATIENCE_SECONDS = 20  # how long a failed rank waits for the others before it ends
BAR_SECONDS = 0.2  # how often the progress bar is redrawn
T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        row: one line of a comparing table: name, parameters, optimizer_bytes, bytes_per_step_logical,
            bytes_per_step_ring, total_bytes (ring), ms_per_step, validation_loss, validation_accuracy (of
            classification), and history: a dict with step, ring_bytes, seconds, validation_loss … per evaluation.
        folder: where summary.json, metrics.jsonl, plan.json, recipe.json and checkpoints/ are.
        summary: the content of summary.json.
        model: the trained model, on the device it was trained on.
    """

    row: dict[str, Any]
    folder: Path
    summary: dict[str, Any] = field(repr=False)
    model: nn.Module = field(repr=False)


def train(recipe: Recipe, *, progress: bool = True) -> RunResult:
    """Trains as `recipe` says, alone or as one of the processes that torchrun started.

    Args:
        progress: show a bar (on a terminal) or one line per evaluation (elsewhere), on rank 0.

    Raises:
        UserError: the recipe, the data, a checkpoint or the model is not usable, or the loss is no longer finite.
            Every rank raises it.
    """
    with init_world() as world, _threads(recipe.threads), CommMeter() as meter:
        run = _Run(recipe, world, meter, progress)
        row = None
        try:
            run.prepare()
            run.train()
            result = run.finish()
            row = result.row
            return result
        finally:
            run.close(row)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Counters:
    """What a run carries over a checkpoint besides tensors, as JSON."""

    step: int = 0
    seconds: float = 0.0  # in steps: without evaluation and checkpoints
    best: float | None = None  # lowest validation loss
    stale: int = 0  # evaluations since then
    history: list[dict[str, Any]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)  # of the processes before this one
    per_step: dict[str, float] = field(default_factory=dict)


class _Run:
    def __init__(self, recipe: Recipe, world: World, meter: CommMeter, progress: bool) -> None:
        self.recipe, self.world, self.meter = recipe, world, meter
        self.progress = progress and world.rank == 0
        self.console: Console | None = None
        self.tracker = Trackers([])
        self.folder = Path(recipe.output) / recipe.name
        self.counters = _Counters()
        self.clock = Clock(world.device)
        self.losses = Losses(world.device)
        self.last_checkpoint: Path | None = None
        self.saved_step: int | None = None
        self.after_first_step = (0, 0.0)
        self.next_show = 0.0
        self.notes: list[str] = []  # what the user should know before the first step

    # ------------------------------------------------------------ before the first step

    def prepare(self) -> None:
        """Checks and builds everything; whatever is wrong on one rank stops all of them."""
        recipe = self.recipe
        engine = self._agree(lambda: engine_class(recipe.engine.name))
        self.task, model = self._agree(lambda: build(recipe, self.world))
        self.parameters = sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )  # before an engine takes them apart
        self.model = engine.prepare(model)
        self.optimizer = self._agree(lambda: build_optimizer(self.model, recipe.optimizer))
        self.schedule = self._agree(lambda: build_schedule(self.optimizer, recipe.schedule, recipe.steps))
        self.engine: Engine = engine(
            self.model,
            self.optimizer,
            scheduler=self.schedule,
            clip_norm=recipe.clip_norm,
            **{name: getattr(recipe.engine, name) for name in ENGINE_OPTIONS[recipe.engine.name]},
        )
        if recipe.checkpoint.resume:
            self._resume()
        self._agree(self._open_folder)

    def _resume(self) -> None:
        saved = self._agree(self._load, "checkpoint")
        if self.world.world_size > 1:
            steps = torch.tensor([self.counters.step, -self.counters.step], device=self.world.device)
            with self.meter.purpose("checkpoint"):
                dist.all_reduce(steps, op=dist.ReduceOp.MAX)
            highest, lowest = int(steps[0]), -int(steps[1])
            if highest != lowest:
                raise UserError(
                    f"some ranks find a checkpoint of step {highest} in {self.folder} and others of step {lowest}: "
                    f"output must be a folder that all of them share"
                )
        if saved is None:
            self.notes.append(f"there is no checkpoint in {self.folder / 'checkpoints'}: it begins at step 0")
            return
        fast_forward(self.schedule, saved.step)
        self.notes.append(f"goes on from {saved.path}")
        if changed := changed_settings(saved.recipe, json.loads(self.recipe.to_json())):
            self.notes.append(f"it goes on with other settings than before: {'; '.join(changed)}")

    def _load(self) -> checkpoint.State | None:
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is None:
            return None
        saved = checkpoint.load(found, engine=self.engine, plan=shared_plan(self.model))
        try:
            self.counters = _Counters(**saved.run)
        except TypeError as error:
            raise CheckpointError(f"the checkpoint {found} was not written by dist_ssn's train ({error})") from None
        self.last_checkpoint, self.saved_step = found, saved.step
        return saved

    def _open_folder(self) -> None:
        if self.world.rank != 0:
            return
        plan = shared_plan(self.model)
        check_wandb(self.recipe.wandb)  # before anything is moved
        try:
            if not self.recipe.checkpoint.resume and (aside := set_aside(self.folder)) is not None:
                self.notes.append(f"{self.folder} held another run, which is in {aside} now")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.json").write_text(self.recipe.to_json() + "\n")
            if plan is not None:
                (self.folder / "plan.json").write_text(plan.to_json() + "\n")
        except OSError as error:
            raise UserError(f"cannot write to the run's folder {self.folder}: {error}; give another output") from error
        if self.progress:
            self.console = Console(self.recipe.name, self.recipe.steps, self.folder)
            for note in self.notes:
                self.console.note(f"{self.recipe.name}: {note}")
        self.tracker = build_tracker(
            self.recipe.wandb,
            self.folder,
            name=self.recipe.name,
            recipe=json.loads(self.recipe.to_json()),
            console=self.console,
            resume_step=self.saved_step,
        )
        if plan is not None:
            self.tracker.table("plan", plan.rows())

    # ------------------------------------------------------------ steps

    def train(self) -> None:
        """Steps until the last one, or until evaluations have not improved for `patience` of them."""
        recipe, counters = self.recipe, self.counters
        self.model.train()
        first = counters.step
        seen = 0  # step times that were logged
        while counters.step < recipe.steps and not self._out_of_patience():
            with self.clock.step():
                loss = self._step(counters.step)
            counters.step += 1
            if (
                recipe.engine.compare_every
                and counters.step % recipe.engine.compare_every == 0
                and self.engine.replicated
            ):
                check_equal(self.engine.module, counters.step)
            if counters.step == first + 1:
                self.after_first_step = self._step_bytes()
            self._show(loss, counters.step - first)
            evaluate = counters.step % recipe.evaluate_every == 0 or counters.step == recipe.steps
            save = recipe.checkpoint.every is not None and counters.step % recipe.checkpoint.every == 0
            if evaluate or save or counters.step % LOG_EVERY == 0:
                self._log(seen, evaluate)
                seen = len(self.clock.times)
            if save:
                self._save()

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
                    loss = self.task.loss(self.engine.model(inputs), targets) / recipe.accumulation
                self.engine.backward(loss, last)
            total += loss.detach()
        self.engine.step()
        self.losses.add(step, total)
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def _show(self, loss: Tensor, steps: int) -> None:
        """Moves the bar, now and then; reading the loss makes the host wait, so not in every step."""
        console = self.console
        if console is None or not console.live or time.perf_counter() < self.next_show:
            return
        self.next_show = time.perf_counter() + BAR_SECONDS
        self.clock.settle()
        seconds = statistics.median(self.clock.times[-20:])
        mb_per_step = self._step_bytes()[1] / steps / 1e6
        console.advance(self.counters.step, loss.item(), self.recipe.batch_size / seconds, mb_per_step)

    def _out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.counters.stale >= self.recipe.patience

    # ------------------------------------------------------------ between steps

    def _log(self, seen: int, evaluate: bool) -> None:
        recipe = self.recipe
        with self.meter.purpose("metrics"):
            mean, first_bad = self.losses.take(self.world.world_size)
        if first_bad is not None:
            raise UserError(
                f"the run {recipe.name} was stopped: its training loss became {mean} in step {first_bad + 1}; try a lower "
                f"optimizer.lr than {recipe.optimizer.lr:g}, a warm-up or a clip_norm; {self._where_to_go_on()}"
            )
        self.clock.settle()
        times = self.clock.times[seen:]
        self.counters.seconds += sum(times)
        values: dict[str, Any] = {
            "train_loss": mean,
            "learning_rate": recipe.optimizer.lr * rate_factor(recipe.schedule, self.counters.step - 1, recipe.steps),
            "samples_per_second": recipe.batch_size * len(times) / sum(times),
            "seconds": self.counters.seconds,
        }
        if evaluate:
            values |= self._evaluate()
        values["ring_bytes"] = self._ring_bytes()
        values["exposed_seconds"] = self.meter.ledger.totals("gradients").exposed_seconds  # of this process
        if evaluate:
            kept = ("seconds", "ring_bytes", *(key for key in values if key.startswith("validation_")))
            self.counters.history.append({"step": self.counters.step, **{key: values[key] for key in kept}})
        self._agree(lambda: self.tracker.log(self.counters.step, values), "metrics")

    def _where_to_go_on(self) -> str:
        if self.last_checkpoint is None:
            return "no checkpoint was written before"
        return f"the last checkpoint is {self.last_checkpoint}"

    def _evaluate(self) -> dict[str, float]:
        means = evaluate(self.engine.module, self.task, self.recipe, self.world, self.meter, self._autocast())
        counters, loss = self.counters, means["validation_loss"]
        improved = counters.best is None or loss < counters.best
        counters.best = loss if improved else counters.best
        counters.stale = 0 if improved else counters.stale + 1
        return means

    def _save(self) -> None:
        counters = dataclasses.replace(self.counters, ledger=self._ledger(), per_step=self._per_step())

        def write() -> Path:
            try:
                return checkpoint.save(
                    self.folder / "checkpoints",
                    step=counters.step,
                    engine=self.engine,
                    recipe_json=self.recipe.to_json(),
                    plan=shared_plan(self.model),
                    keep=self.recipe.checkpoint.keep,
                    run=jsonable(dataclasses.asdict(counters)),
                )
            except NotFinite as error:
                raise UserError(
                    f"the run {self.recipe.name} was stopped: {error}; try a lower optimizer.lr; {self._where_to_go_on()}"
                ) from None

        self._agree(write, "checkpoint")
        self.last_checkpoint = checkpoint.latest(self.folder / "checkpoints")
        self.saved_step = counters.step

    # ------------------------------------------------------------ the end

    def finish(self) -> RunResult:
        """The last checkpoint, the row of the comparing table, `summary.json`."""
        if self.saved_step != self.counters.step:
            self._save()
        counters = self.counters
        last = counters.history[-1] if counters.history else self._evaluate()
        row: dict[str, Any] = {
            "name": self.recipe.name,
            "parameters": self.parameters,
            "optimizer_bytes": state_bytes(self.optimizer),
            **self._per_step(),
            "total_bytes": self._ring_bytes(),
            **{key: value for key, value in last.items() if key.startswith("validation_")},
            "history": counters.history,
        }
        ledger = self._ledger()
        by_purpose: dict[str, int] = {}
        for entry in ledger:
            by_purpose[entry["purpose"]] = by_purpose.get(entry["purpose"], 0) + round(entry["ring_bytes"])
        summary = {
            "rows": [row],
            "ring_bytes_by_purpose": by_purpose,
            "ledger": ledger,
            "best_validation_loss": counters.best,
            "steps": counters.step,
            "stopped_early": counters.step < self.recipe.steps,
            "seconds": counters.seconds,
            "world_size": self.world.world_size,
            "device": str(self.world.device),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "recipe": json.loads(self.recipe.to_json()),
        }

        def write() -> None:
            if self.world.rank == 0:
                self.tracker.table("ledger", ledger)
                write_whole(
                    self.folder / "summary.json", json.dumps(jsonable(summary), indent=1, allow_nan=False) + "\n"
                )

        self._agree(write)
        return RunResult(row, self.folder, summary, self.model)

    def close(self, row: dict[str, Any] | None) -> None:
        """Ends tracking. Of a run that failed (`row` is None), the other ranks wait until rank 0 has done so.

        A launcher kills all processes as soon as one has ended with an error, which may be before rank 0 has said why.
        """
        self.tracker.close(row)
        if row is None and self.world.world_size > 1 and isinstance(sys.exc_info()[1], UserError):
            waiting = dist.barrier(async_op=True)
            # Every rank raises the same; should one have died nonetheless, the others end without it.
            with suppress(RuntimeError):
                assert waiting is not None
                waiting.wait(timedelta(seconds=PATIENCE_SECONDS))

    def _per_step(self) -> dict[str, float]:
        """What a step of this process has cost; what its predecessor said if it has made none."""
        steps = len(self.clock.times)
        if not steps:
            return self.counters.per_step
        logical, ring = self._step_bytes()
        if steps > 1:
            logical, ring = logical - self.after_first_step[0], ring - self.after_first_step[1]
        counted = max(1, steps - 1)
        return {
            "bytes_per_step_logical": round(logical / counted),
            "bytes_per_step_ring": round(ring / counted),
            "ms_per_step": 1000 * self.clock.median(),
        }

    def _step_bytes(self) -> tuple[int, float]:
        """Logical and ring bytes of all steps of this process."""
        totals = [self.meter.ledger.totals(purpose) for purpose in ("gradients", "parameters", "buffers")]
        return sum(part.logical_bytes for part in totals), sum(part.ring_bytes for part in totals)

    def _ring_bytes(self) -> int:
        return round(sum(entry["ring_bytes"] for entry in self._ledger()))

    def _ledger(self) -> list[dict[str, Any]]:
        return merged_rows(self.counters.ledger, self.meter.ledger.rows())

    def _agree(self, action: Callable[[], T], purpose: str = "other") -> T:
        with self.meter.purpose(purpose):
            return together(action, self.world.device)
