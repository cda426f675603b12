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

from annotated_types import Ge, Gt, Le, Lt
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
    except (TypeError, ValueError, RecursionError):
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


def _limit(limit: str | None) -> str | None:
    if limit is not None:
        from dist_ssn.sync.rounds import parse_limit

        parse_limit(limit)
    return limit


def _rising(steps: tuple[int, ...]) -> tuple[int, ...]:
    if list(steps) != sorted(set(steps)) or any(step < 1 for step in steps):
        raise mistake(f"must be rising step numbers, got {list(steps)}")
    return steps


Count = Annotated[StrictInt, Ge(1)]
Ordinal = Annotated[StrictInt, Ge(0)]
Positive = Annotated[StrictFloat, Gt(0)]
NotNegative = Annotated[StrictFloat, Ge(0)]
Fraction = Annotated[StrictFloat, Ge(0), Le(1)]
BelowOne = Annotated[StrictFloat, Ge(0), Lt(1)]


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
        dict[str, str] | str,
        AfterValidator(_mapping),
        Field(examples=["auto", "depth:4", {"layers.*": "blocks"}]),
        Says(type="a name, or a dict of globs to groups"),
    ] = "auto"
    """Assignment of weights to banks: the name of a mapping, or a dict of globs over weight names to groups."""
    morph: Annotated[str, AfterValidator(_morph), Field(examples=["auto", "offset"])] = "auto"
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
    milestones: Annotated[tuple[StrictInt, ...], AfterValidator(_rising), Field(examples=[[500, 800]])] = ()
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
        if share.keep:
            text = (
                "is above 0, and a difference from kept weights cannot be pruned: prune the merged model, or leave it 0"
            )
            yield Problem("prune.final", text, ("share.keep",))
        reads = ("prune.final", "share.budget", "share.plan", "share.control")
        if self.what == "bank" and ((share.budget is None and share.plan is None) or share.control is not None):
            text = "is bank, and this model has none: set share.budget, or prune its weights"
            yield Problem("prune.what", text, reads)
        if self.what == "weights" and share.control is not None:
            text = f"is weights, which the control {share.control} makes in its own way: leave one of them out"
            yield Problem("prune.what", text, reads)


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
    limit: Annotated[str | None, AfterValidator(_limit), Field(examples=["20kB/step"])] = None
    """Bytes that a process sends per step, on average: chooses share.budget, every and codec where they are not given."""

    def options(self) -> dict[str, Any] | None:
        """Keyword arguments of `LocalUpdates`; None without local updates."""
        if self.every is None:
            return None
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("within", "limit"))
        return {name: getattr(self, name) for name in names}

    def rules(self, recipe: Recipe) -> Iterator[Problem]:
        """Rules across keys."""
        if self.every is None and self.limit is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    text = "needs local updates: set sync.every too, such as --sync.every=16"
                    yield Problem(f"sync.{field.name}", text, ("sync.every",))
            return
        own = "sync.every" if self.limit is None else "sync.limit"
        engine, reads = recipe.engine, (own, "engine.name")
        if self.limit is not None and self.within is not None:
            text = (
                "counts what a process sends, and islands send gradients on every step: set sync.every with sync.within"
            )
            yield Problem("sync.limit", text, ("sync.within",))
        if engine.name == "fsdp":
            text = "goes with the engine ddp or mpi; a script can train islands of FSDP2, by LocalUpdates(group=...)"
            yield Problem(own, text, reads)
        if engine.name == "deepspeed":
            text = "goes with the engine ddp or mpi, not with deepspeed, which averages gradients on every step"
            yield Problem(own, text, reads)
        if self.within is not None and engine.name == "mpi":
            yield Problem("sync.within", "goes with the engine ddp, not with mpi", ("engine.name",))
        if self.outer_momentum is not None and self.outer == "average":
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
    overlap: Annotated[str, AfterValidator(_overlap), Field(examples=["none", "segments:4", "sums:2", "delay"])] = (
        "none"
    )
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


@checked(RecipeError)
class Recipe:
    """A training run."""

    name: Annotated[str, AfterValidator(_name)] = "run"
    """Name of the run, and of its folder in output."""
    seed: Ordinal = 0
    """Seed of the initial weights and of the order of the data."""
    output: Annotated[str, AfterValidator(_not_empty)] = "runs"
    """Folder of the runs."""
    model: Annotated[str, AfterValidator(_model), Field(examples=["gpt", "wide_resnet", "my_module.build"])] = "gpt"
    """Model: gpt, wide_resnet, or the import path of a function that returns an nn.Module."""
    model_args: Annotated[
        dict[str, Any],
        AfterValidator(_plain),
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
        yield from self.prune.rules(self)
        yield from self.sync.rules(self)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        refuse("Recipe", [*self.rules(), *(info.context(self) if info.context else ())])
        return self

    def to_json(self) -> str:
        """This recipe as JSON text, which `recipe_from_json` reads back to an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2)  # pyright: ignore[reportArgumentType]


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which settings two recipes differ, other than those that say how a run is started."""
    # A recipe of an older version lacks keys, and was trained as their defaults say.
    default, old, new = (dict(_flat(recipe)) for recipe in (json.loads(Recipe().to_json()), before, now))
    old = default | old
    return [f"{key} was {old.get(key)} and is {value}" for key, value in new.items() if old.get(key) != value]


def _flat(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if key not in SETTINGS_OF_A_START:
            yield from (
                ((f"{key}.{name}", part) for name, part in value.items()) if isinstance(value, dict) else [(key, value)]
            )
