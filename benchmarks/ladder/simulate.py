"""Several workers in one process: local steps, then an exchange of changes. The loss is that of as many processes.

The loss curve of a synchronous method does not depend on the link, so a simulation measures it. Each worker has its own
parameters, optimizer state and buffers, and its own part of each batch. In an exchange every worker sends anchor − local through a
codec; what the codec lost is kept and added the next time. The mean of what was sent is the gradient of the outer optimizer on the
anchor, from which all workers go on. With `every=1` the gradients are sent instead, and all workers share one optimizer, as with a
communication hook.

Letters: n workers, P parameters.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ladder.cells import WORKERS, Cell, recipe_of
from benchmarks.ladder.exchange import SimulatedExchange
from benchmarks.ladder.twin import Twin
from dist_ssn.comm import CommMeter
from dist_ssn.engines import World
from dist_ssn.sync.outer import outer_optimizer
from dist_ssn.sync.trained import trained_parameters
from dist_ssn.train.build import build
from dist_ssn.train.data import Task
from dist_ssn.train.evaluate import evaluate
from dist_ssn.train.models import build_model
from dist_ssn.train.optim import build_optimizer, build_schedule
from dist_ssn.train.recipe.schema import Recipe

Met = tuple[Tensor, SimulatedExchange]
"""The workers' vectors [n, P], and their exchange."""
POINTS = 24
"""Exchanges of a run whose agreement is kept, evenly spread."""


class Worker:
    """A replica with its own optimizer and schedule.

    Args:
        model: Its parameters become views of `values`.
        recipe: Its optimizer, schedule and clipping.
        dense: The same architecture, not shared.

    Attributes:
        values: All trained parameters [P], those that a codec packs first.
        packed: Number of these.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, dense: nn.Module) -> None:
        self.model = model
        self.called = Twin(model, dense) if recipe.share.budget else model
        self.optimizer = build_optimizer(model, recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["fused"] = (
                True  # many small tensors: a kernel per tensor and operation costs more than the mathematics
            )
        self.schedule = build_schedule(self.optimizer, recipe.schedule, recipe.steps)
        self.clip = recipe.clip_norm
        found = trained_parameters(model, self.optimizer)
        self.parameters = [one.parameter for one in found]
        self.packed = sum(one.parameter.numel() for one in found if not one.plain)
        self.values = torch.cat([one.detach().flatten() for one in self.parameters])
        for parameter, part in self.parts(self.values):
            parameter.data = part

    def parts(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each trained parameter beside its part of `values` [P], in its shape."""
        parts = values.split([one.numel() for one in self.parameters])
        return ((one, part.view_as(one)) for one, part in zip(self.parameters, parts, strict=True))

    def gradient(self) -> Tensor:
        """Gradients of all trained parameters [P]."""
        found = (torch.zeros_like(one) if one.grad is None else one.grad for one in self.parameters)
        return torch.cat([gradient.flatten() for gradient in found])

    def backward(self, task: Task, batch: tuple[Tensor, Tensor]) -> None:
        task.loss(self.called(batch[0]), batch[1]).backward()

    def step(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def exchange(self, wanted: Cell, workers: int) -> SimulatedExchange:
        """An exchange of vectors like `values`, in the codecs of a cell."""
        return SimulatedExchange(len(self.values), self.packed, wanted["codec"], workers, wanted["small"])


def agreement(changes: Tensor) -> dict[str, float]:
    """Agreement of the workers' changes [n, P].

    Returns:
        cosine: mean over all pairs of workers. largest: share of the sum of squares that the largest 1/64 of the values have, mean
        over workers. norm: mean over workers.
    """
    norms = changes.norm(dim=1)
    unit = changes / norms.clamp(min=1e-30)[:, None]
    pairs = [float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(len(changes)), 2)]
    largest = unit.square().topk(max(1, changes.shape[1] // 64), dim=1).values.sum(1)
    return {"cosine": sum(pairs) / len(pairs), "largest": float(largest.mean()), "norm": float(norms.mean())}


def run(wanted: Cell) -> dict[str, Any]:
    """Trains one cell in this process. Returns it with its losses, bytes and agreement."""
    torch.set_num_threads(1)
    recipe, began = recipe_of(wanted), time.perf_counter()
    world = World(0, 1, 0, torch.device("cpu"))
    task, model = build(recipe, world)
    dense = build_model(recipe.model, recipe.model_args, task)
    steps = (every_step if wanted["every"] == 1 else local_updates)(wanted, recipe, task, model, dense)
    rounds = -(-recipe.steps // wanted["every"])
    kept = {round(index * (rounds - 1) / (POINTS - 1)) for index in range(POINTS)}
    history, points, handed, sent = [], [], 0, 0.0
    for step, met in enumerate(steps, start=1):
        if met is not None:
            vectors, exchange = met
            handed, sent = handed + exchange.handed_bytes, sent + exchange.sent_bytes
            if len(vectors) > 1 and -(-step // wanted["every"]) - 1 in kept:
                points.append({"step": step, **agreement(vectors)})
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            found = evaluate(model, task, recipe, world, CommMeter(), torch.autocast("cpu", enabled=False))
            history.append({"step": step, "bytes": handed, "ring_bytes": sent, **found})
    last = {key: value for key, value in history[-1].items() if key.startswith("validation")}
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    measured = {
        "parameters": parameters,
        "workers": WORKERS,
        "steps": recipe.steps,
        "bytes": handed,
        "ring_bytes": sent,
        **last,
    }
    return {**wanted, **measured, "history": history, "agreement": points, "seconds": time.perf_counter() - began}


def every_step(wanted: Cell, recipe: Recipe, task: Task, model: nn.Module, dense: nn.Module) -> Iterator[Met]:
    """Trains `model` on the mean of the workers' gradients. Yields for each step what the workers gave.

    Without a codec the whole batch is one backward (its gradient is the mean), except with batch norm, which sees a worker's part.
    """
    worker = Worker(model, recipe, dense)
    exchange = worker.exchange(wanted, WORKERS)
    apart = wanted["codec"] != "none" or any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    parts = WORKERS if apart else 1
    for step in range(recipe.steps):
        found = []
        for rank in range(parts):
            worker.backward(task, task.batch(step, recipe.batch_size, rank, parts))
            found.append(worker.gradient())
            worker.optimizer.zero_grad()
        mean = found[0] if parts == 1 else exchange.average(found)
        for parameter, part in worker.parts(mean):
            parameter.grad = part
        worker.step()
        yield torch.stack(found), exchange


def local_updates(
    wanted: Cell, recipe: Recipe, task: Task, model: nn.Module, dense: nn.Module, workers: int = WORKERS
) -> Iterator[Met | None]:
    """Trains copies of `model`, which is the anchor. Yields the workers' changes, or None between exchanges."""
    replicas = [Worker(copy.deepcopy(model), recipe, copy.deepcopy(dense)) for _ in range(workers)]
    whole = Worker(model, recipe, dense)
    anchor, exchange = whole.values, whole.exchange(wanted, workers)
    rate, momentum = wanted["outer"]
    outer = outer_optimizer("nesterov" if momentum else "average", [anchor], rate, momentum or None)
    for step in range(recipe.steps):
        for rank, worker in enumerate(replicas):
            worker.backward(task, task.batch(step, recipe.batch_size, rank, workers))
            worker.step()
        if (step + 1) % wanted["every"] and step + 1 < recipe.steps:
            yield None
            continue
        changes = anchor - torch.stack([worker.values for worker in replicas])
        anchor.grad = exchange.average(list(changes))
        outer.step()
        for worker in replicas:
            worker.values.copy_(anchor)
        for own, buffer in zip(model.buffers(), replicas[0].model.buffers(), strict=True):
            own.copy_(buffer)
        yield changes, exchange
