"""Measured compute of a recipe, dense, shared and in rounds, and the file that keeps it to plan for a cluster elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_ssn.cost.exchange import coding_seconds, exchange_seconds
from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.overlap import Exposure, Message, messages_of, predict
from dist_ssn.cost.rates import Rates, measure_rates
from dist_ssn.cost.timeline import Timeline, measure_timeline
from dist_ssn.engines import World
from dist_ssn.errors import UserError
from dist_ssn.files import read_json, replace_text
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan import Plan
from dist_ssn.plan.overlap import Overlap
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.rounds import Vector, vector_of
from dist_ssn.train.build import build
from dist_ssn.train.optim import build_optimizer
from dist_ssn.train.recipe.schema import Recipe

FORMAT = 1
MOST_SPREAD = 1.5
"""Duration of a slow step over that of a quick one, from which on the repetitions are said to disagree."""
_MODEL = ("model", "model_args", "batch_size", "accumulation", "precision")  # what compute depends on, beside the bank


@dataclass(frozen=True)
class Side:
    """A model, dense or shared.

    Args:
        plan: None if it is dense.
        own: name → number of elements, of each trainable parameter outside of the plan.
        timeline: its measured compute.
        counted: what local updates would send, by `vector_of`.
    """

    plan: Plan | None
    own: Mapping[str, int]
    timeline: Timeline
    counted: Vector | None = None

    @property
    def vector(self) -> Vector:
        """The vector of local updates; where it was not counted, as if all of it travelled in the codec."""
        return self.counted or Vector(self.parameters, 0)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(self.own.values()) + (0 if self.plan is None else sum(g.parameters for g in self.plan.groups))

    @property
    def compute(self) -> float:
        """Seconds of a step in which nothing is sent."""
        return float(self.timeline.end.mean())

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of a quick and of a slow step: nine of ten of the repetitions are slower, or quicker; of the slowest process."""
        low, high = np.quantile(self.timeline.end.max(axis=1), (0.1, 0.9))
        return float(low), float(high)

    @property
    def disagrees(self) -> bool:
        """True if repetitions differ by more than MOST_SPREAD: another program used the machine, so that its times mean little."""
        low, high = self.spread
        return high > MOST_SPREAD * low

    def step(self, fabric: Fabric, overlap: Overlap | None = None, plan: Plan | None = None) -> Exposure:
        """Predicted cost of a step.

        Args:
            fabric: the processes and their links.
            overlap: the overlap setting; none by default.
            plan: another plan of the same weights, whose compute is assumed to be the same.
        """
        overlap = overlap or Overlap()
        return predict(self.messages(plan, overlap), overlap, self.timeline, fabric)

    def messages(self, plan: Plan | None = None, overlap: Overlap | None = None) -> list[Message]:
        """The messages of a step, in order; arguments as in `step`."""
        return messages_of(plan or self.plan, self.own, overlap or Overlap(), self.timeline)

    def step_with_hook(self, codec: str, fabric: Fabric, rates: Rates, plan: Plan | None = None) -> Exposure:
        """Predicted cost of a step whose gradients travel in a codec, by `dist_ssn.comm_hook`.

        Args:
            codec: name of the codec.
            fabric: the processes and their links.
            rates: of encoding and decoding, which a thread does beside backward.
            plan: see `step`.
        """
        messages, n = self.messages(plan), fabric.processes
        seconds = [
            exchange_seconds(message.vector, codec, n, fabric) + coding_seconds(message.vector, codec, n, rates)
            for message in messages
        ]
        return predict(messages, Overlap(), self.timeline, fabric, seconds)


@dataclass(frozen=True)
class Measured:
    """Both sides of a recipe, its weights, and the rates of what local updates compute."""

    dense: Side
    shared: Side
    specs: Specs
    rates: Rates | None = None


def measure(recipe: Recipe, world: World, steps: int = 20, known: Path | None = None) -> Measured:
    """Builds both sides and measures their compute, on one process or on all processes at once.

    Args:
        recipe: a shared one.
        world: this process among the job's.
        steps: number of measured steps.
        known: a file of `save`, whose times are used instead.

    Raises:
        UserError: the recipe is dense or cannot be built, or the file belongs to another recipe.
    """
    if recipe.share.budget is None and recipe.share.plan is None:
        raise UserError(
            "share.budget is null, which leaves the model dense: give one to compare with, such as --share.budget=10%"
        )
    timelines, rates = ((None, None), None) if known is None else _load(known, recipe)
    dense = dataclasses.replace(
        recipe, share=dataclasses.replace(recipe.share, budget=None, plan=None, keep=False, train=())
    )
    specs, first = _side(dense, world, steps, timelines[0])
    assert specs is not None
    second = _side(recipe, world, steps, timelines[1])[1]
    if known is not None and rates is None:
        warnings.warn(
            f"{known} was written before it had rates of codecs, so these are measured on this machine: write it anew with "
            f"--calibrate={known} where the rest was measured",
            stacklevel=2,
        )
    return Measured(first, second, specs, rates or measure_rates(second.parameters, world.device))


def _side(recipe: Recipe, world: World, steps: int, timeline: Timeline | None) -> tuple[Specs | None, Side]:
    task, model = build(recipe, world)
    plan, specs, counted = shared_plan(model), None, vector_of(model)
    if plan is None:  # before it is trained, because initial values say what is left out
        specs = find_specs(model, recipe.share.include, recipe.share.exclude)
    if timeline is None:
        optimizer = build_optimizer(model, recipe.optimizer)
        model.train()

        def loss_of(step: int) -> torch.Tensor:
            batch = task.batch(step, recipe.batch_size, world.rank, world.world_size, recipe.accumulation, 0)
            inputs, targets = (part.to(world.device) for part in batch)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                return task.loss(model(inputs), targets)

        timeline = measure_timeline(model, optimizer, loss_of, steps)
    own = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and "dist_ssn." not in name}
    return specs, Side(plan, own, timeline, counted)


def save(measured: Measured, recipe: Recipe, path: Path) -> None:
    """Writes the compute of both sides; an error leaves no partial file.

    Raises:
        UserError: the file cannot be written.
    """
    sides = {"dense": measured.dense.timeline, "shared": measured.shared.timeline}
    content = {"format": FORMAT, "recipe": _described(recipe)}
    content |= {name: _plain(timeline) for name, timeline in sides.items()}
    content["rates"] = None if measured.rates is None else dataclasses.asdict(measured.rates)
    try:
        replace_text(path, json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _described(recipe: Recipe) -> dict[str, Any]:
    everything = json.loads(recipe.to_json())
    return {key: everything[key] for key in _MODEL}


def _plain(timeline: Timeline) -> dict[str, Any]:
    ready = {name: times.tolist() for name, times in timeline.ready.items()}
    return {"ready": ready, "end": timeline.end.tolist(), "drag": timeline.drag}


def _load(path: Path, recipe: Recipe) -> tuple[tuple[Timeline, Timeline], Rates | None]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as measured compute ({error}): make it with --calibrate={path}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no measured compute of format {FORMAT}: make it with --calibrate={path}")
    here, there = _described(recipe), content.get("recipe")
    for key in _MODEL:
        if not isinstance(there, dict) or there.get(key) != here[key]:
            was = there.get(key) if isinstance(there, dict) else None
            raise UserError(
                f"{path} was measured with {key} {was!r}, and this recipe has {here[key]!r}: measure again, or use that value"
            )
    timelines = _timeline(path, content.get("dense")), _timeline(path, content.get("shared"))
    return timelines, _rates(path, content.get("rates"))


def _rates(path: Path, plain: Any) -> Rates | None:
    """The rates in a file; None if it is of before there were any."""
    if plain is None:
        return None
    try:
        rates = Rates(
            float(plain["meet"]),
            *({name: float(plain[what][name]) for name in CODECS} for what in ("encode", "decode")),
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path} is no measured compute: make it with --calibrate={path}") from None
    numbers = (rates.meet, *rates.encode.values(), *rates.decode.values())
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise UserError(f"{path} is damaged: its rates must be 0 or more, and finite")
    return rates


def _timeline(path: Path, plain: Any) -> Timeline:
    try:
        end = np.array(plain["end"], dtype=float)
        ready = {str(name): np.array(times, dtype=float) for name, times in plain["ready"].items()}
        drag = float(plain["drag"])
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path} is no measured compute: make it with --calibrate={path}") from None
    tables = [end, *ready.values()]
    if end.ndim != 2 or not end.size or any(table.shape != end.shape for table in tables):
        raise UserError(f"{path} is damaged: its times must be tables of one shape, [steps, processes]")
    if (
        drag < 0
        or not np.isfinite(drag)
        or not all(np.isfinite(table).all() and (table >= 0).all() for table in tables)
    ):
        raise UserError(f"{path} is damaged: its times must be 0 or more, and finite")
    return Timeline(ready, end, drag)
