"""Sections of a recipe, each with its keys and the rules across them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, StrictBool, StrictFloat, StrictInt

from dist_ssn.checked import Problem, Says, checked
from dist_ssn.errors import PlanError, RecipeError
from dist_ssn.train.recipe.value_types import (
    BelowOne,
    ByteLimit,
    Count,
    Fraction,
    MappingChoice,
    MorphChoice,
    NotNegative,
    Ordinal,
    OverlapChoice,
    Positive,
    RisingSteps,
)

ENGINE_OPTIONS: dict[str, tuple[str, ...]] = {
    "ddp": ("static_graph", "find_unused_parameters", "overlap", "compress"),
    "fsdp": (),
    "deepspeed": ("stage", "config"),
    "mpi": ("cuda_aware", "overlap"),
}
"""engine → which keys of `EngineConfig` it takes as arguments."""


@checked(RecipeError)
class DataConfig:
    """Training and validation data."""

    name: Literal["text", "digits", "fashion_mnist", "fashion_captions", "cifar10", "cifar100"] = "text"
    """Data set."""
    path: Annotated[str | None, Field(examples=["cifar-10-binary.tar.gz"])] = None
    """File, folder or glob with the data; null: the place where the set is usually installed."""
    limit: Annotated[Count | None, Field(examples=[10000])] = None
    """Number of training samples to use (of text: bytes, before validation is held out); null: all."""
    validation: Annotated[StrictFloat, Gt(0), Lt(1)] = 0.1
    """Fraction held out for validation, for sets without a test set of their own (text, digits)."""
    fold: Ordinal = 0
    """Part that is held out, for K-fold cross-validation; 0: the last, 1: the one before it."""
    augment: StrictBool = True
    """Shift and flip training images at random."""


@checked(RecipeError)
class ShareConfig:
    """Sharing of parameters between the model's weights."""

    budget: Annotated[
        StrictInt | StrictFloat | str | None,
        Field(examples=["10%", 0.1, 5000000, "5M", "5MB/step"]),
        Says(type='a budget such as 0.1, "10%" or "5MB", or null'),
    ] = None
    """Trainable parameters for all shared weights: a fraction of their number, a count, or bytes sent per step; null: dense."""
    mapping: Annotated[
        MappingChoice,
        Field(examples=["auto", "depth:4", {"layers.*": "blocks"}]),
        Says(type="a name, or a dict of globs to groups"),
    ] = "auto"
    """Assignment of weights to banks: the name of a mapping, or a dict of globs over weight names to groups."""
    morph: Annotated[MorphChoice, Field(examples=["auto", "offset"])] = "auto"
    """Method that makes a weight from its bank; auto: chosen by the budget."""
    include: Annotated[tuple[str, ...] | None, Field(examples=[["layers.*"]])] = None
    """Names, globs or classes of the weights to share; null: all that can be."""
    exclude: Annotated[tuple[str, ...] | None, Field(examples=[["head.*"]])] = None
    """Names, globs or classes of the weights to keep dense; null: none."""
    plan: Annotated[str | None, Field(examples=["plan.json"])] = None
    """JSON file of a plan to follow instead of budget, mapping and morph; null: none."""
    control: Literal["tied", "hashed", "hashed-global", "lowrank"] | None = None
    """Baseline method to train with this budget instead of sharing; null: none."""
    seed: Ordinal = 0
    """Seed of the plan's pseudo-random choices."""
    generate: Literal["auto", "on_demand", "per_step"] = "auto"
    """Weights are generated on demand (no copy in memory) or once per forward (quicker); auto: the latter for small models."""
    keep: StrictBool = False
    """Keep the values of model_weights, frozen, and train a generated difference from them."""
    train: Annotated[tuple[str, ...], Field(examples=[["head", "*.bias"]])] = ()
    """Names or globs of parameters that are trained whole beside the banks (keep)."""

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        if self.train and not self.keep:
            yield Problem("share.train", "goes with share.keep: without it everything is trained", ("share.keep",))
        if self.keep and self.budget is None and self.plan is None:
            text = "is true, which needs a budget or a plan: set share.budget too, such as --share.budget=1%"
            yield Problem("share.keep", text, ("share.budget", "share.plan"))
        if isinstance(self.budget, str):
            from dist_ssn.plan.budget import unreadable  # with torch, so only where it is needed

            if (text := unreadable(self.budget)) is not None:
                yield Problem("share.budget", f"{self.budget!r:.60} {text}")
        if self.control is None:
            return
        if self.budget is None:
            yield Problem(
                "share.control",
                f"is {self.control}, which needs a budget: set share.budget too, such as --share.budget=10%",
                ("share.budget",),
            )
        unset_values = {"plan": None, "mapping": "auto", "morph": "auto", "generate": "auto", "keep": False}
        for name, unset in unset_values.items():
            shown = json.dumps(unset).strip('"')
            if getattr(self, name) != unset:
                yield Problem(
                    f"share.{name}",
                    f"is for shared weights, and share.control {self.control} has no banks: leave one of them {shown}",
                    ("share.control",),
                )


@checked(RecipeError)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    lr: Annotated[Positive, Field(examples=[3e-3, 0.1])] = 1e-3
    """Learning rate of the dense model, which a shared model uses too."""
    weight_decay: NotNegative = 0.01
    """Weight decay of banks and weights; biases, norms, gains and coefficients have none."""
    betas: Annotated[
        tuple[BelowOne, BelowOne],
        Says("two numbers, at least 0 and below 1", "a list of two numbers, such as [0.9, 0.95]"),
    ] = (0.9, 0.95)
    """Decay of the first and second moment (adamw)."""
    momentum: BelowOne = 0.9
    """Momentum (sgd)."""
    nesterov: StrictBool = True
    """Use Nesterov's momentum (sgd)."""


@checked(RecipeError)
class ScheduleConfig:
    """The learning rate over the steps."""

    name: Literal["constant", "cosine", "step"] = "cosine"
    """Shape of the schedule."""
    warmup: Annotated[Ordinal, Field(examples=[50])] = 0
    """Number of steps in which the learning rate grows linearly."""
    final: Fraction = 0.1
    """Learning rate at the last step, as a fraction of optimizer.lr (cosine)."""
    milestones: Annotated[RisingSteps, Field(examples=[[500, 800]])] = ()
    """Steps at which the learning rate is multiplied by gamma (step)."""
    gamma: Annotated[StrictFloat, Gt(0), Le(1)] = 0.1
    """Factor at each milestone (step)."""

    def rules(self, steps: int) -> Iterator[Problem]:
        """Rules across keys."""
        if self.warmup > steps:
            yield Problem("schedule.warmup", f"must be at most the {steps} steps, got {self.warmup}", ("steps",))
        if self.name == "step" and not self.milestones:
            text = "must name at least one step, for schedule.name is step"
            yield Problem("schedule.milestones", text, ("schedule.name",))


@checked(RecipeError)
class DistillConfig:
    """A trained model whose outputs are targets beside the data's own."""

    teacher: Annotated[str | None, Field(examples=["dense", "runs/dense"])] = None
    """Folder of a finished run; dense: this recipe without sharing, trained first; null: no teacher."""
    weight: Fraction = 0.5
    """Fraction of the loss that compares logits with the teacher's; the rest uses the data."""
    temperature: Positive = 2.0
    """Divisor of both models' logits where they are compared."""
    hidden: Annotated[tuple[str, ...], Field(examples=[["layers.*"]])] = ()
    """Names or globs of submodules whose outputs are compared too."""
    hidden_weight: NotNegative = 1.0
    """Weight of the mean squared error between these outputs."""

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        if self.hidden and self.teacher is None:
            yield Problem("distill.hidden", "needs a teacher: set distill.teacher too", ("distill.teacher",))


@checked(RecipeError)
class PruneConfig:
    """Magnitude pruning (engines ddp and mpi)."""

    final: BelowOne = 0.0
    """Fraction of the parameters that is zero at the end; 0: no pruning."""
    what: Literal["bank", "weights"] = "bank"
    """Parameters to prune: those of banks, or generated weights."""
    begin: Ordinal = 0
    """Number of steps before the first pruning."""
    end: StrictInt | None = None
    """Step from which the final fraction is zero; if it equals begin, all at once; null: the last step."""
    every: Count = 10
    """Number of steps between two prunings."""


@checked(RecipeError)
class SyncConfig:
    """Local updates: processes train apart, and average what they have changed (engines ddp and mpi)."""

    every: Annotated[Count | None, Field(examples=[16])] = None
    """Number of steps in a round; null: gradients are averaged on every step."""
    outer: Literal["nesterov", "average"] = "nesterov"
    """Optimizer of what all processes hold in common, whose gradient is the mean change."""
    outer_rate: Annotated[Positive | None, Says("a number above 0, or null")] = None
    """Learning rate of the outer optimizer; null: 0.7 (nesterov) or 1 (average)."""
    outer_momentum: Annotated[BelowOne | None, Says("at least 0 and below 1, or null")] = None
    """Momentum of the outer optimizer; null: 0.6 (nesterov)."""
    codec: Literal["none", "fp16", "bf16", "int8", "int4", "bins2", "sparse"] = "none"
    """Number format of changes on the network; what it loses is sent later."""
    delay: Annotated[StrictInt, Ge(0), Le(1)] = 0
    """Number of rounds during which a mean change travels."""
    warmup: Ordinal = 0
    """Number of first steps after each of which parameters are averaged plainly."""
    outlier: Annotated[StrictFloat | None, Field(gt=1), Says("a number above 1, or null")] = 10.0
    """Multiple of the median norm above which a process's change is left out of a round; null: only what is not finite."""
    within: Annotated[Literal["node"] | None, Field(examples=["node"])] = None
    """Processes that average gradients on every step, so that only nodes train apart; null: none (ddp)."""
    limit: Annotated[ByteLimit, Field(examples=["20kB/step"])] = None
    """Bytes that a process sends per step, on average: chooses share.budget, every and codec where they are not given."""

    def options(self) -> dict[str, Any] | None:
        """Keyword arguments of `LocalUpdates`; None without local updates."""
        if self.every is None:
            return None
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("within", "limit"))
        return {name: getattr(self, name) for name in names}


@checked(RecipeError)
class CheckpointConfig:
    """Checkpoints."""

    every: Annotated[Count | None, Field(examples=[1000])] = None
    """Number of steps between two checkpoints; null: at the end, and as every_seconds says."""
    every_seconds: Annotated[Positive | None, Field(examples=[600]), Says("a number of seconds above 0, or null")] = (
        None
    )
    """Seconds between two checkpoints; null: not by time."""
    keep: Count = 2
    """Number of latest checkpoints to keep."""
    resume: StrictBool = False
    """Continue from the latest checkpoint of this run, if there is one."""
    base: StrictBool = False
    """Also write what share.keep keeps, as base.safetensors."""


@checked(RecipeError)
class EngineConfig:
    """Cooperation of the processes."""

    name: Literal["ddp", "fsdp", "deepspeed", "mpi"] = "ddp"
    """Engine."""
    static_graph: StrictBool = False
    """Every step uses the same layers in the same order (ddp)."""
    find_unused_parameters: StrictBool = False
    """Some steps leave layers out (ddp)."""
    stage: Annotated[StrictInt | None, Field(ge=0, le=3), Says("0, 1, 2 or 3")] = None
    """Stage of ZeRO; null: the stage in config, else 1 (deepspeed)."""
    config: Annotated[str | None, Field(examples=["ds.json"])] = None
    """JSON file with DeepSpeed's own configuration; null: none (deepspeed)."""
    cuda_aware: StrictBool = False
    """Pass gradients on a GPU to MPI without a copy (mpi)."""
    overlap: Annotated[OverlapChoice, Field(examples=["none", "segments:4", "sums:2", "delay"])] = "none"
    """Communication of gradients while processes compute: none, segments:N, sums:N or delay (ddp, mpi)."""
    compress: Annotated[str, Field(examples=["fp16"])] = "none"
    """Number format of gradients on the network: none or fp16 (ddp)."""
    compare_every: Count | None = 100
    """Number of steps between two proofs that all ranks hold the same parameters; null: none."""
    timeout_seconds: Annotated[StrictFloat, Gt(0), Lt(1e9), Says("a number of seconds above 0")] = 600.0
    """Seconds that processes wait for each other, at the start and in each collective."""

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        for option in sorted({name for names in ENGINE_OPTIONS.values() for name in names}):
            if option not in ENGINE_OPTIONS[self.name] and getattr(self, option) not in (False, "none", None):
                owners = " or ".join(name for name, options in ENGINE_OPTIONS.items() if option in options)
                text = f"goes with the engine {owners}, not with {self.name}"
                yield Problem(f"engine.{option}", text, ("engine.name",))
        if self.overlap == self.compress == "none":
            return
        from dist_ssn.plan.overlap import check_compress, parse_overlap

        try:
            check_compress(self.compress, parse_overlap(self.overlap))
        except PlanError as error:
            yield Problem("engine.compress", f"is wrong: {error}", ("engine.overlap",))


@checked(RecipeError)
class WandbConfig:
    """Weights & Biases, beside the JSON lines that are always written."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Mode of W&B; offline logs to a local folder."""
    project: str = "dist_ssn"
    """Project of the run."""
    entity: str | None = None
    """User or team; null: the account's own."""
    tags: Annotated[tuple[str, ...], Field(examples=[["baseline"]])] = ()
    """Tags of the run."""
