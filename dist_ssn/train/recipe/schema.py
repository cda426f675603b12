"""A recipe: everything that a training run depends on, as one frozen and typed value.

The keys of a YAML file and of the command line, with their types and defaults, are the fields of the dataclasses below:
`recipe_file.py` reads them, `recipe_keys.py` knows their types, `recipe_values.py` what each may be.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# These may differ when a run goes on.
SETTINGS_OF_A_START = ("name", "output", "threads", "checkpoint", "engine", "wandb", "predicted")


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Args:
        name: data set: text, digits, fashion_mnist, fashion_captions, cifar10 or cifar100
        path: file, folder or glob that holds it; null: where the set is usually found
        limit: use only the first so many training samples (of text: bytes, before anything is held out); null: all
        validation: fraction held out for validation, of the sets that have no test set of their own (text, digits)
        fold: which such part is held out, 0 being the last one and 1 the one before: for K-fold cross-validation
        augment: shift and flip training images at random
    """

    name: str = "text"
    path: str | None = None
    limit: int | None = None
    validation: float = 0.1
    fold: int = 0
    augment: bool = True


@dataclass(frozen=True)
class ShareConfig:
    """How the model's weights share their parameters.

    Args:
        budget: trainable numbers for all the weights: 0.1, "10%", 5000000, "5M", "5MB", "5MB/step"; null: dense
        mapping: which weights share a bank; or a dict of globs of weight names to groups
        morph: how a weight is made from its bank
        include: names, globs or classes of the weights to share; null: all that can be
        exclude: names, globs or classes of the weights to leave as they are
        plan: JSON file of a plan to follow instead of budget, mapping and morph
        control: instead of sharing, a control of this budget: tied, hashed, hashed-global or lowrank
        seed: seed of the plan's pseudo-random choices
    """

    budget: int | float | str | None = None
    mapping: dict[str, str] | str = "auto"
    morph: str = "auto"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    plan: str | None = None
    control: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer.

    Args:
        name: adamw or sgd
        lr: learning rate of the dense model, which a shared model uses too
        weight_decay: decay of banks and weights; biases, norms, gains and coefficients have none
        betas: decay of the first and second moment (adamw)
        momentum: momentum (sgd)
        nesterov: Nesterov's momentum (sgd)
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    nesterov: bool = True


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps.

    Args:
        name: cosine, step or constant
        warmup: steps in which the rate grows linearly
        final: rate at the last step, as a fraction of lr (cosine)
        milestones: steps at which the rate is multiplied by gamma (step)
        gamma: factor at each milestone (step)
    """

    name: str = "cosine"
    warmup: int = 0
    final: float = 0.1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1


DENSE = "dense"
"""A teacher's name: the recipe without sharing."""


@dataclass(frozen=True)
class DistillConfig:
    """A trained model whose outputs are targets beside the data's own.

    Args:
        teacher: folder of a run that has ended; dense: this recipe without sharing, trained first; null: none
        weight: part of the loss that asks for the teacher's logits, the rest asks for the data's targets
        temperature: both sides' logits are divided by it where they are compared
        hidden: names or globs of submodules whose outputs are compared too
        hidden_weight: weight of the mean squared error between these outputs
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 2.0
    hidden: tuple[str, ...] = ()
    hidden_weight: float = 1.0


@dataclass(frozen=True)
class PruneConfig:
    """Magnitude pruning.

    Args:
        final: part of the numbers that is zero in the end; 0: no pruning
        what: bank, or weights
        begin: steps before the first are pruned
        end: step from which all are pruned that will be, at once if it is begin; null: the last
        every: steps between two prunings
    """

    final: float = 0.0
    what: str = "bank"
    begin: int = 0
    end: int | None = None
    every: int = 10


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between two checkpoints; null: only at the end, and as every_seconds says
        every_seconds: seconds between two checkpoints; null: none for the time's sake
        keep: how many of the latest to keep
        resume: go on from the latest checkpoint of this run, if there is one
    """

    every: int | None = None
    every_seconds: float | None = None
    keep: int = 2
    resume: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """How the processes work together.

    Args:
        name: ddp, fsdp, deepspeed or mpi
        static_graph: every step uses the same layers in the same order (ddp)
        find_unused_parameters: some steps leave layers out (ddp)
        stage: ZeRO's, 0 to 3; null: what config says, else 1 (deepspeed)
        config: JSON file with DeepSpeed's own configuration (deepspeed)
        cuda_aware: gradients on a GPU are handed to MPI as they are (mpi)
        overlap: how gradients travel while processes compute: none, segments:N, sums:N or delay (ddp, mpi)
        compress: how gradients are made smaller to travel: none or fp16 (ddp)
        compare_every: steps between two proofs that all ranks hold the same parameters; null: none
        timeout_seconds: how long processes wait for each other, at the start and in each collective
    """

    name: str = "ddp"
    static_graph: bool = False
    find_unused_parameters: bool = False
    stage: int | None = None
    config: str | None = None
    cuda_aware: bool = False
    overlap: str = "none"
    compress: str = "none"
    compare_every: int | None = 100
    timeout_seconds: float = 600.0


ENGINE_OPTIONS: dict[str, tuple[str, ...]] = {
    "ddp": ("static_graph", "find_unused_parameters", "overlap", "compress"),
    "fsdp": (),
    "deepspeed": ("stage", "config"),
    "mpi": ("cuda_aware", "overlap"),
}
"""engine → which keys of `EngineConfig` it takes as arguments."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside the JSON lines that are always written.

    Args:
        mode: disabled, offline or online
        project: project of the run
        entity: user or team; null: the account's own
        tags: tags of the run
    """

    mode: str = "disabled"
    project: str = "dist_ssn"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        name: name of the run, and of its folder in output
        seed: seed of the initial weights and of the order of the data
        output: folder of the runs
        model: gpt, wide_resnet, or the import path of a function that returns an nn.Module, such as my_module.build
        model_args: arguments of that function
        data: the data
        share: how weights share parameters
        optimizer: the optimizer
        schedule: the learning rate over the steps
        distill: a teacher
        prune: magnitude pruning (ddp, mpi)
        steps: optimizer steps
        batch_size: samples per step, of all processes and accumulated micro-batches together
        accumulation: micro-batches per step
        clip_norm: largest norm of the gradient; null: not clipped
        precision: fp32 or bf16 (autocast)
        evaluate_every: steps between two evaluations
        evaluate_batches: batches (of batch_size samples) in an evaluation
        patience: stop after so many evaluations without a better one; null: never
        checkpoint: checkpoints
        engine: how processes work together
        wandb: Weights & Biases
        predicted: file with what dist-ssn plan --cluster … --json said of this run, to be told beside what it did (ddp, mpi)
        threads: processor threads of each process; null: as torch chooses
    """

    name: str = "run"
    seed: int = 0
    output: str = "runs"
    model: str = "gpt"
    model_args: dict = field(default_factory=dict)  # as dict[str, Any], jsonargparse would make "3" in it a number
    data: DataConfig = field(default_factory=DataConfig)
    share: ShareConfig = field(default_factory=ShareConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    clip_norm: float | None = 1.0
    precision: str = "fp32"
    evaluate_every: int = 100
    evaluate_batches: int = 16
    patience: int | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    predicted: str | None = None
    threads: int | None = None

    def to_json(self) -> str:
        """This recipe as JSON text, which `from_json` reads back to an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2)


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
