"""A recipe: everything that a training run depends on, as one frozen and typed value.

The keys of a YAML file and of the command line are the fields below, with their types, bounds, defaults and help. A rule stands
beside its key: as a bound, as a function that the key's type names, or in `rules` of its section if it reads other keys too. Rules
that depend on where a run starts, on its processes and the files there, are in `check.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt, ValidationInfo, model_validator
from typing_extensions import Self

from dist_ssn.checked import Problem, Says, checked, mistake, refuse
from dist_ssn.errors import PlanError, RecipeError, unknown_choice

# These may differ when a run goes on.
SETTINGS_OF_A_START = ("name", "output", "threads", "checkpoint", "engine", "wandb", "predicted")

DENSE = "dense"
"""A teacher's name: the recipe without sharing."""

ENGINE_OPTIONS: dict[str, tuple[str, ...]] = {
    "ddp": ("static_graph", "find_unused_parameters", "overlap", "compress"),
    "fsdp": (),
    "deepspeed": ("stage", "config"),
    "mpi": ("cuda_aware", "overlap"),
}
"""engine → which keys of `EngineConfig` it takes as arguments."""


def _name(name: str) -> str:
    if Path(_not_empty(name)).name != name or name == "..":
        raise mistake(f"must be a plain name, for it names the run's folder, got {name!r}")
    return name


def _not_empty(text: str) -> str:
    if not text.strip():
        raise mistake("must not be empty")
    return text


# Rules of other parts are imported where a value is checked: with them comes torch, for which --help should not wait.


def _model(model: str) -> str:
    from dist_ssn.train.models import MODELS

    if _not_empty(model) not in MODELS and "." not in model:
        known = unknown_choice("name", model, MODELS)
        raise mistake(f"is an {known}; a model of your own is an import path such as my_module.build")
    return model


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):
        raise mistake("must hold only text, numbers, true, false, null, lists and dicts of them") from None
    return values


def _mapping(mapping: dict[str, str] | str) -> dict[str, str] | str:
    if mapping != "auto":
        from dist_ssn.plan.mapping import check_mapping

        check_mapping(mapping)
    return mapping


def _morph(morph: str) -> str:
    if morph != "auto":
        from dist_ssn.plan.rules import parse_morph

        parse_morph(morph)
    return morph


def _overlap(overlap: str) -> str:
    from dist_ssn.plan.overlap import parse_overlap

    parse_overlap(overlap)
    return overlap


def _rising(steps: tuple[int, ...]) -> tuple[int, ...]:
    if list(steps) != sorted(set(steps)) or any(step < 1 for step in steps):
        raise mistake(f"must be rising step numbers, got {list(steps)}")
    return steps


_Beta = Annotated[StrictFloat, Field(ge=0, lt=1)]


@checked(RecipeError)
class DataConfig:
    """Training and validation data."""

    name: Annotated[
        Literal["text", "digits", "fashion_mnist", "fashion_captions", "cifar10", "cifar100"],
        Field(description="Data set."),
    ] = "text"
    path: Annotated[
        str | None,
        Field(
            description="File, folder or glob with the data; null: the place where the set is usually installed.",
            examples=["cifar-10-binary.tar.gz"],
        ),
    ] = None
    limit: Annotated[
        StrictInt | None,
        Field(
            ge=1,
            description="Number of training samples to use (of text: bytes, before validation is held out); null: all.",
            examples=[10000],
        ),
    ] = None
    validation: Annotated[
        StrictFloat,
        Field(
            gt=0,
            lt=1,
            description="Fraction held out for validation, for sets without a test set of their own (text, digits).",
        ),
    ] = 0.1
    fold: Annotated[
        StrictInt,
        Field(
            ge=0, description="Part that is held out, for K-fold cross-validation; 0: the last, 1: the one before it."
        ),
    ] = 0
    augment: Annotated[StrictBool, Field(description="Shift and flip training images at random.")] = True


@checked(RecipeError)
class ShareConfig:
    """How the model's weights share their parameters."""

    budget: Annotated[
        StrictInt | StrictFloat | str | None,
        Field(
            description="Number of trainable parameters for all shared weights: a fraction of their number (0.1, 10%), "
            "a count (5000000, 5M), or bytes sent per step (5MB, 5MB/step); null: a dense model.",
            examples=["10%", 0.1, 5000000, "5M", "5MB/step"],
        ),
        Says(type='a budget such as 0.1, "10%" or "5MB", or null'),
    ] = None
    mapping: Annotated[
        dict[str, str] | str,
        AfterValidator(_mapping),
        Field(
            description="Which weights share a bank: the name of a mapping, or a dict of globs over weight names to groups.",
            examples=["auto", "depth:4", {"layers.*": "blocks"}],
        ),
        Says(type="a name, or a dict of globs to groups"),
    ] = "auto"
    morph: Annotated[
        str,
        AfterValidator(_morph),
        Field(description="How a weight is made from its bank.", examples=["auto", "offset"]),
    ] = "auto"
    include: Annotated[
        tuple[str, ...] | None,
        Field(
            description="Names, globs or classes of the weights to share; null: all that can be.",
            examples=[["layers.*"]],
        ),
    ] = None
    exclude: Annotated[
        tuple[str, ...] | None,
        Field(description="Names, globs or classes of the weights to keep dense; null: none.", examples=[["head.*"]]),
    ] = None
    plan: Annotated[
        str | None,
        Field(
            description="JSON file of a plan to follow instead of budget, mapping and morph; null: none.",
            examples=["plan.json"],
        ),
    ] = None
    control: Annotated[
        Literal["tied", "hashed", "hashed-global", "lowrank"] | None,
        Field(description="Baseline method to train with this budget instead of sharing; null: none."),
    ] = None
    seed: Annotated[StrictInt, Field(ge=0, description="Seed of the plan's pseudo-random choices.")] = 0

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        if self.control is None:
            return
        if self.budget is None:
            yield Problem(
                "share.control",
                f"is {self.control}, which needs a budget: set share.budget too, such as --share.budget=10%",
                ("share.budget",),
            )
        for name, unset, shown in (("plan", None, "null"), ("mapping", "auto", "auto"), ("morph", "auto", "auto")):
            if getattr(self, name) != unset:
                yield Problem(
                    f"share.{name}",
                    f"is for shared weights, and share.control {self.control} has no banks: leave one of them {shown}",
                    ("share.control",),
                )


@checked(RecipeError)
class OptimizerConfig:
    """The optimizer."""

    name: Annotated[Literal["adamw", "sgd"], Field(description="Optimizer.")] = "adamw"
    lr: Annotated[
        StrictFloat,
        Field(
            gt=0, description="Learning rate of the dense model, which a shared model uses too.", examples=[3e-3, 0.1]
        ),
    ] = 1e-3
    weight_decay: Annotated[
        StrictFloat,
        Field(ge=0, description="Weight decay of banks and weights; biases, norms, gains and coefficients have none."),
    ] = 0.01
    betas: Annotated[
        tuple[_Beta, _Beta],
        Field(description="Decay of the first and second moment (adamw)."),
        Says("two numbers, at least 0 and below 1", "a list of two numbers, such as [0.9, 0.95]"),
    ] = (0.9, 0.95)
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1, description="Momentum (sgd).")] = 0.9
    nesterov: Annotated[StrictBool, Field(description="Use Nesterov's momentum (sgd).")] = True


@checked(RecipeError)
class ScheduleConfig:
    """The learning rate over the steps."""

    name: Annotated[Literal["cosine", "step", "constant"], Field(description="Shape of the schedule.")] = "cosine"
    warmup: Annotated[
        StrictInt, Field(ge=0, description="Number of steps in which the learning rate grows linearly.", examples=[50])
    ] = 0
    final: Annotated[
        StrictFloat,
        Field(ge=0, le=1, description="Learning rate at the last step, as a fraction of optimizer.lr (cosine)."),
    ] = 0.1
    milestones: Annotated[
        tuple[StrictInt, ...],
        AfterValidator(_rising),
        Field(description="Steps at which the learning rate is multiplied by gamma (step).", examples=[[500, 800]]),
    ] = ()
    gamma: Annotated[StrictFloat, Field(gt=0, le=1, description="Factor at each milestone (step).")] = 0.1

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

    teacher: Annotated[
        str | None,
        Field(
            description="Folder of a finished run; dense: this recipe without sharing, trained first; null: no teacher.",
            examples=["dense", "runs/dense"],
        ),
    ] = None
    weight: Annotated[
        StrictFloat,
        Field(
            ge=0,
            le=1,
            description="Fraction of the loss that compares logits with the teacher's; the rest uses the data.",
        ),
    ] = 0.5
    temperature: Annotated[
        StrictFloat, Field(gt=0, description="Divisor of both models' logits where they are compared.")
    ] = 2.0
    hidden: Annotated[
        tuple[str, ...],
        Field(description="Names or globs of submodules whose outputs are compared too.", examples=[["layers.*"]]),
    ] = ()
    hidden_weight: Annotated[
        StrictFloat, Field(ge=0, description="Weight of the mean squared error between these outputs.")
    ] = 1.0

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        if self.hidden and self.teacher is None:
            yield Problem("distill.hidden", "needs a teacher: set distill.teacher too", ("distill.teacher",))


@checked(RecipeError)
class PruneConfig:
    """Magnitude pruning (engines ddp and mpi)."""

    final: Annotated[
        StrictFloat, Field(ge=0, lt=1, description="Fraction of the parameters that is zero at the end; 0: no pruning.")
    ] = 0.0
    what: Annotated[
        Literal["bank", "weights"], Field(description="What is pruned: parameters of banks, or generated weights.")
    ] = "bank"
    begin: Annotated[StrictInt, Field(ge=0, description="Number of steps before the first pruning.")] = 0
    end: Annotated[
        StrictInt | None,
        Field(
            description="Step from which the final fraction is zero; if it equals begin, all at once; null: the last step."
        ),
    ] = None
    every: Annotated[StrictInt, Field(ge=1, description="Number of steps between two prunings.")] = 10

    def rules(self, recipe: Recipe) -> Iterator[Problem]:
        """Rules across keys."""
        if not self.final:
            return
        end = recipe.steps if self.end is None else self.end
        if not self.begin <= end <= recipe.steps:
            text = f"must lie between prune.begin = {self.begin} and steps = {recipe.steps}, got {end}"
            yield Problem("prune.end", text, ("prune.final", "prune.begin", "steps"))
        if recipe.engine.name not in ("ddp", "mpi"):
            text = (
                f"goes with the engine ddp or mpi, whose processes hold all parameters, not with {recipe.engine.name}"
            )
            yield Problem("prune.final", text, ("engine.name",))
        share = recipe.share
        reads = ("prune.final", "share.budget", "share.plan", "share.control")
        if self.what == "bank" and ((share.budget is None and share.plan is None) or share.control is not None):
            text = "is bank, and this model has none: set share.budget, or prune its weights"
            yield Problem("prune.what", text, reads)
        if self.what == "weights" and share.control is not None:
            text = f"is weights, which the control {share.control} makes in its own way: leave one of them out"
            yield Problem("prune.what", text, reads)


@checked(RecipeError)
class CheckpointConfig:
    """Checkpoints."""

    every: Annotated[
        StrictInt | None,
        Field(
            ge=1,
            description="Number of steps between two checkpoints; null: at the end, and as every_seconds says.",
            examples=[1000],
        ),
    ] = None
    every_seconds: Annotated[
        StrictFloat | None,
        Field(gt=0, description="Seconds between two checkpoints; null: not by time.", examples=[600]),
        Says("a number of seconds above 0, or null"),
    ] = None
    keep: Annotated[StrictInt, Field(ge=1, description="Number of latest checkpoints to keep.")] = 2
    resume: Annotated[
        StrictBool, Field(description="Continue from the latest checkpoint of this run, if there is one.")
    ] = False


@checked(RecipeError)
class EngineConfig:
    """How processes work together."""

    name: Annotated[Literal["ddp", "fsdp", "deepspeed", "mpi"], Field(description="Engine.")] = "ddp"
    static_graph: Annotated[
        StrictBool, Field(description="Every step uses the same layers in the same order (ddp).")
    ] = False
    find_unused_parameters: Annotated[StrictBool, Field(description="Some steps leave layers out (ddp).")] = False
    stage: Annotated[
        StrictInt | None,
        Field(ge=0, le=3, description="Stage of ZeRO; null: the stage in config, else 1 (deepspeed)."),
        Says("0, 1, 2 or 3"),
    ] = None
    config: Annotated[
        str | None,
        Field(
            description="JSON file with DeepSpeed's own configuration; null: none (deepspeed).", examples=["ds.json"]
        ),
    ] = None
    cuda_aware: Annotated[StrictBool, Field(description="Pass gradients on a GPU to MPI without a copy (mpi).")] = False
    overlap: Annotated[
        str,
        AfterValidator(_overlap),
        Field(
            description="How gradients travel while processes compute: none, segments:N, sums:N or delay (ddp, mpi).",
            examples=["none", "segments:4", "sums:2", "delay"],
        ),
    ] = "none"
    compress: Annotated[
        str, Field(description="Number format of gradients on the network: none or fp16 (ddp).", examples=["fp16"])
    ] = "none"
    compare_every: Annotated[
        StrictInt | None,
        Field(
            ge=1, description="Number of steps between two proofs that all ranks hold the same parameters; null: none."
        ),
    ] = 100
    timeout_seconds: Annotated[
        StrictFloat,
        Field(
            gt=0, lt=1e9, description="Seconds that processes wait for each other, at the start and in each collective."
        ),
        Says("a number of seconds above 0"),
    ] = 600.0

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

    mode: Annotated[
        Literal["disabled", "offline", "online"], Field(description="Whether and where W&B logs the run.")
    ] = "disabled"
    project: Annotated[str, Field(description="Project of the run.")] = "dist_ssn"
    entity: Annotated[str | None, Field(description="User or team; null: the account's own.")] = None
    tags: Annotated[tuple[str, ...], Field(description="Tags of the run.", examples=[["baseline"]])] = ()


@checked(RecipeError)
class Recipe:
    """A training run."""

    name: Annotated[str, AfterValidator(_name), Field(description="Name of the run, and of its folder in output.")] = (
        "run"
    )
    seed: Annotated[StrictInt, Field(ge=0, description="Seed of the initial weights and of the order of the data.")] = 0
    output: Annotated[str, AfterValidator(_not_empty), Field(description="Folder of the runs.")] = "runs"
    model: Annotated[
        str,
        AfterValidator(_model),
        Field(
            description="Model: gpt, wide_resnet, or the import path of a function that returns an nn.Module.",
            examples=["gpt", "wide_resnet", "my_module.build"],
        ),
    ] = "gpt"
    model_args: Annotated[
        dict[str, Any],
        AfterValidator(_plain),
        Field(
            description="Keyword arguments of that function; --model_args.NAME=value sets one of them.",
            examples=[{"layers": 4, "width": 128}],
        ),
        Says(type="a dict of argument names to values"),
    ] = dataclasses.field(default_factory=dict)
    data: DataConfig = DataConfig()
    share: ShareConfig = ShareConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    distill: DistillConfig = DistillConfig()
    prune: PruneConfig = PruneConfig()
    steps: Annotated[StrictInt, Field(ge=1, description="Number of optimizer steps.")] = 1000
    batch_size: Annotated[
        StrictInt,
        Field(ge=1, description="Samples per step, of all processes and accumulated micro-batches together."),
    ] = 32
    accumulation: Annotated[StrictInt, Field(ge=1, description="Micro-batches per step and process.")] = 1
    clip_norm: Annotated[
        StrictFloat | None,
        Field(gt=0, description="Largest norm of the gradient; null: no clipping."),
        Says("a number above 0, or null for no clipping"),
    ] = 1.0
    precision: Annotated[
        Literal["fp32", "bf16"], Field(description="Number format of computing; bf16 uses autocast.")
    ] = "fp32"
    evaluate_every: Annotated[StrictInt, Field(ge=1, description="Number of steps between two evaluations.")] = 100
    evaluate_batches: Annotated[
        StrictInt, Field(ge=1, description="Number of batches, of batch_size samples each, in an evaluation.")
    ] = 16
    patience: Annotated[
        StrictInt | None,
        Field(
            ge=1,
            description="Number of evaluations without a better one after which a run stops; null: never.",
            examples=[5],
        ),
    ] = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    wandb: WandbConfig = WandbConfig()
    predicted: Annotated[
        str | None,
        Field(
            description="File that dist-ssn plan --cluster … --json wrote, to compare its prediction with the run; null: none "
            "(ddp, mpi).",
            examples=["predicted.json"],
        ),
    ] = None
    threads: Annotated[
        StrictInt | None,
        Field(ge=1, description="Processor threads of each process; null: torch's own choice.", examples=[1]),
    ] = None

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        yield from self.engine.rules()
        yield from self.schedule.rules(self.steps)
        yield from self.share.rules()
        if self.predicted is not None and self.engine.name not in ("ddp", "mpi"):
            text = f"goes with the engine ddp or mpi, not with {self.engine.name}"
            yield Problem("predicted", text, ("engine.name",))
        yield from self.distill.rules()
        yield from self.prune.rules(self)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        refuse("Recipe", [*self.rules(), *(info.context(self) if info.context else ())])
        return self

    def to_json(self) -> str:
        """This recipe as JSON text, which `recipe_from_json` reads back to an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2)  # pyright: ignore[reportArgumentType]


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which settings two recipes differ, other than those that say how a run is started."""
    old, new = (dict(_flat(recipe)) for recipe in (before, now))
    return [f"{key} was {old.get(key)} and is {value}" for key, value in new.items() if old.get(key) != value]


def _flat(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if key not in SETTINGS_OF_A_START:
            yield from (
                ((f"{key}.{name}", part) for name, part in value.items()) if isinstance(value, dict) else [(key, value)]
            )
