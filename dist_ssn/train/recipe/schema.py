"""A recipe: everything that a training run depends on, as one frozen and typed value.

The keys of a YAML file and of the command line are the fields below and those of `sections.py`, with their types, bounds, defaults
and help. A rule stands beside its key: as a bound, as a type of `value_types.py`, or in `rules` of its section. Those between
sections are below; those that depend on where a run starts, on its processes and the files there, are in `check.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import Self

from dist_ssn.checked import Problem, Says, checked, refuse
from dist_ssn.errors import RecipeError
from dist_ssn.train.recipe.sections import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EngineConfig,
    OptimizerConfig,
    PruneConfig,
    ScheduleConfig,
    ShareConfig,
    SyncConfig,
    WandbConfig,
)
from dist_ssn.train.recipe.value_types import Count, ModelName, NotEmpty, Ordinal, PlainValues, Positive, RunName

# These may differ when a run goes on.
SETTINGS_OF_A_START = ("name", "output", "threads", "checkpoint", "engine", "wandb", "predicted")

DENSE = "dense"
"""A teacher's name: the recipe without sharing."""


@checked(RecipeError)
class Recipe:
    """A training run."""

    name: RunName = "run"
    """Name of the run, and of its folder in output."""
    seed: Ordinal = 0
    """Seed of the initial weights and of the order of the data."""
    output: NotEmpty = "runs"
    """Folder of the runs."""
    model: Annotated[ModelName, Field(examples=["gpt", "wide_resnet", "my_module.build"])] = "gpt"
    """Model: gpt, wide_resnet, or the import path of a function that returns an nn.Module."""
    model_args: Annotated[
        PlainValues,
        Field(examples=[{"layers": 4, "width": 128}]),
        Says(type="a dict of argument names to values"),
    ] = dataclasses.field(default_factory=dict)
    """Keyword arguments of that function; --model_args.NAME=value sets one of them."""
    model_weights: Annotated[str | None, Field(examples=["pretrained.safetensors"])] = None
    """Safetensors file with values for all tensors of the model; null: the model's initial values."""
    data: DataConfig = DataConfig()
    share: ShareConfig = ShareConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    distill: DistillConfig = DistillConfig()
    prune: PruneConfig = PruneConfig()
    steps: Count = 1000
    """Number of optimizer steps."""
    batch_size: Count = 32
    """Samples per step, of all processes and accumulated micro-batches together."""
    accumulation: Count = 1
    """Micro-batches per step and process."""
    clip_norm: Annotated[Positive | None, Says("a number above 0, or null for no clipping")] = 1.0
    """Largest norm of the gradient; null: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of computing; bf16 uses autocast."""
    evaluate_every: Count = 100
    """Number of steps between two evaluations."""
    evaluate_batches: Count = 16
    """Number of batches, of batch_size samples each, in an evaluation."""
    patience: Annotated[Count | None, Field(examples=[5])] = None
    """Number of evaluations without a better one after which a run stops; null: never."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    sync: SyncConfig = SyncConfig()
    engine: EngineConfig = EngineConfig()
    wandb: WandbConfig = WandbConfig()
    predicted: Annotated[str | None, Field(examples=["predicted.json"])] = None
    """File that dist-ssn plan --cluster … --json wrote, to compare its prediction with the run; null: none (ddp, mpi)."""
    threads: Annotated[Count | None, Field(examples=[1])] = None
    """Processor threads of each process; null: torch's own choice."""

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        yield from self.engine.rules()
        yield from self.schedule.rules(self.steps)
        yield from self.share.rules()
        if self.share.keep and self.model_weights is None:
            yield Problem(
                "share.keep", "is true, and there are no values to keep: set model_weights too", ("model_weights",)
            )
        shares = self.share.budget is not None or self.share.plan is not None
        if self.model_weights is not None and shares and not self.share.keep:
            text = "would be lost, because a shared model draws new values: set share.keep, or no share.budget and no share.plan"
            yield Problem("model_weights", text, ("share.keep", "share.budget", "share.plan"))
        if self.predicted is not None and self.engine.name not in ("ddp", "mpi"):
            text = f"goes with the engine ddp or mpi, not with {self.engine.name}"
            yield Problem("predicted", text, ("engine.name",))
        yield from self.distill.rules()
        yield from _rules_of_prune(self)
        yield from _rules_of_sync(self)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        refuse("Recipe", [*self.rules(), *(info.context(self) if info.context else ())])
        return self

    def to_json(self) -> str:
        """This recipe as JSON text, which `recipe_from_json` reads back to an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2)  # pyright: ignore[reportArgumentType]


def _rules_of_prune(recipe: Recipe) -> Iterator[Problem]:
    """Rules between prune and other sections."""
    prune = recipe.prune
    if not prune.final:
        return
    end = recipe.steps if prune.end is None else prune.end
    if not prune.begin <= end <= recipe.steps:
        text = f"must lie between prune.begin = {prune.begin} and steps = {recipe.steps}, got {end}"
        yield Problem("prune.end", text, ("prune.final", "prune.begin", "steps"))
    if recipe.engine.name not in ("ddp", "mpi"):
        text = f"goes with the engine ddp or mpi, whose processes hold all parameters, not with {recipe.engine.name}"
        yield Problem("prune.final", text, ("engine.name",))
    share = recipe.share
    if share.keep:
        text = "is above 0, and a difference from kept weights cannot be pruned: prune the merged model, or leave it 0"
        yield Problem("prune.final", text, ("share.keep",))
    reads = ("prune.final", "share.budget", "share.plan", "share.control")
    if prune.what == "bank" and ((share.budget is None and share.plan is None) or share.control is not None):
        text = "is bank, and this model has none: set share.budget, or prune its weights"
        yield Problem("prune.what", text, reads)
    if prune.what == "weights" and share.control is not None:
        text = f"is weights, which the control {share.control} makes in its own way: leave one of them out"
        yield Problem("prune.what", text, reads)


def _rules_of_sync(recipe: Recipe) -> Iterator[Problem]:
    """Rules between sync and other sections."""
    sync = recipe.sync
    if sync.every is None and sync.limit is None:
        for field in dataclasses.fields(sync):
            if getattr(sync, field.name) != field.default:
                text = "needs local updates: set sync.every too, such as --sync.every=16"
                yield Problem(f"sync.{field.name}", text, ("sync.every",))
        return
    own = "sync.every" if sync.limit is None else "sync.limit"
    engine, reads = recipe.engine, (own, "engine.name")
    if sync.limit is not None and sync.within is not None:
        text = "counts what a process sends, and islands send gradients on every step: set sync.every with sync.within"
        yield Problem("sync.limit", text, ("sync.within",))
    if engine.name == "fsdp":
        text = "goes with the engine ddp or mpi; a script can train islands of FSDP2, by LocalUpdates(group=...)"
        yield Problem(own, text, reads)
    if engine.name == "deepspeed":
        text = "goes with the engine ddp or mpi, not with deepspeed, which averages gradients on every step"
        yield Problem(own, text, reads)
    if sync.within is not None and engine.name == "mpi":
        yield Problem("sync.within", "goes with the engine ddp, not with mpi", ("engine.name",))
    if sync.outer_momentum is not None and sync.outer == "average":
        yield Problem("sync.outer_momentum", "goes with sync.outer nesterov, not with average", ("sync.outer",))
    for name, unset in (("overlap", "none"), ("compress", "none")):
        if getattr(engine, name) != unset:
            text = f"is for gradients that are averaged on every step: leave it none with {own}"
            yield Problem(f"engine.{name}", text, (own,))
    if recipe.prune.final:
        text = f"needs processes that hold the same parameters after every step: leave out prune.final or {own}"
        yield Problem("prune.final", text, (own,))
    if recipe.predicted is not None:
        yield Problem("predicted", f"is for gradients that are averaged on every step, not for {own}", reads)


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which settings two recipes differ, other than those that say how a run is started."""
    # A recipe of an older version lacks keys, and was trained as their defaults say.
    default, old, new = (dict(_flat(recipe)) for recipe in (json.loads(Recipe().to_json()), before, now))
    old = default | old
    changed = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
    return [f"{key} was {_written(was)} and is {_written(value)}" for key, (was, value) in changed.items()]


def _written(value: Any) -> str:
    """A value as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _flat(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if key not in SETTINGS_OF_A_START:
            yield from (
                ((f"{key}.{name}", part) for name, part in value.items()) if isinstance(value, dict) else [(key, value)]
            )
