"""Building of a recipe's task and model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.baselines import control
from dist_ssn.engines import World
from dist_ssn.errors import PlanError, RecipeError, UserError, describe
from dist_ssn.files import read_tensors, read_text
from dist_ssn.plan import Plan
from dist_ssn.sharing.attach import share
from dist_ssn.sharing.columns import load_flat
from dist_ssn.train.data import Task, load_task
from dist_ssn.train.models import HasHints, build_model
from dist_ssn.train.recipe.check import validate
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import ShareConfig


def build(recipe: Recipe, world: World) -> tuple[Task, nn.Module]:
    """The task and the model of a recipe, shared if the recipe has a budget or a plan, on this process's device.

    Raises:
        UserError: the recipe, the data or the model is not usable with this number of processes.
    """
    validate(recipe, world.world_size)
    task = load_task(recipe.data, context=recipe.model_args.get("context"), seed=recipe.seed)
    for note in task.notes if world.rank == 0 else ():
        warnings.warn(note, stacklevel=2)
    # Both raise now, and not in the middle of a run, if there is too little data for these ranks and this batch.
    batch = task.batch(0, recipe.batch_size, world.rank, world.world_size, recipe.accumulation, 0)
    task.validation(recipe.batch_size, world.rank, world.world_size, recipe.evaluate_batches)
    torch.manual_seed(recipe.seed)
    model = start_model(recipe, task)
    _check_fit(model, task, batch, recipe)
    return task, share_as(model, recipe.share).to(world.device)


def start_model(recipe: Recipe, task: HasHints) -> nn.Module:
    """A recipe's dense model with the values that it starts from: those of `model_weights`, or its initial ones.

    Raises:
        RecipeError: the model cannot be built, or the file is not that of such a model.
    """
    model = build_model(recipe.model, recipe.model_args, task)
    if recipe.model_weights is not None:
        _read_weights(model, recipe.model_weights)
    return model


def _read_weights(model: nn.Module, path: str) -> None:
    """Reads all parameters and buffers of a model; the file may have a tied tensor under any of its names."""
    try:
        found = read_tensors(Path(path))
    except (OSError, ValueError) as error:
        raise RecipeError(f"model_weights: cannot read {path}: {error}") from error
    wanted = model.state_dict(keep_vars=True)
    ties: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        ties.setdefault(id(tensor), []).append(name)
    for names in ties.values():
        if known := [name for name in names if name in found]:
            found |= {name: found[known[0]] for name in names if name not in found}
    load_flat(found, {name: tensor.shape for name, tensor in wanted.items()})
    problems = [f"it has no {name}" for name in wanted if name not in found]
    problems += [f"the model has no {name}" for name in found if name not in wanted]
    problems += [
        f"{name} has the shape {tuple(found[name].shape)} there and {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RecipeError(f"model_weights: {path} is of another model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(found)


@torch.no_grad()
def _check_fit(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor], recipe: Recipe) -> None:
    """Runs one sample through the model.

    Raises:
        RecipeError: the model does not take the data, or the loss does not take the model's output.
    """
    inputs, targets = (part[:1] for part in batch)
    was_training = model.training
    try:
        task.loss(model.eval()(inputs), targets)
    except UserError:
        raise
    except Exception as error:  # whatever a model may raise
        shapes = f"inputs {list(inputs.shape)} of {inputs.dtype}, targets {list(targets.shape)}"
        raise RecipeError(
            f"model {recipe.model!r} does not fit data.name {recipe.data.name!r} ({shapes}): {describe(error)}"
        ) from error
    finally:
        model.train(was_training)


def share_as(model: nn.Module, config: ShareConfig) -> nn.Module:
    """Shares `model` in place by a recipe's budget, plan file or baseline (`control`); without any of them it stays dense.

    Raises:
        PlanError: the plan's file cannot be read.
    """
    how: Any = {"generate": config.generate, "keep": config.keep, "train": config.train}
    if config.plan is not None:
        plan = plan_of_file(config.plan)
        return share(model, None, plan=plan, include=config.include, exclude=config.exclude, **how)
    if config.budget is None:
        return model
    if config.control is not None:
        return control(
            model, config.control, config.budget, include=config.include, exclude=config.exclude, seed=config.seed
        )
    return share(
        model,
        config.budget,
        mapping=config.mapping,
        morph=config.morph,
        include=config.include,
        exclude=config.exclude,
        seed=config.seed,
        **how,
    )


def plan_of_file(path: str) -> Plan:
    """The plan in a recipe's `share.plan`.

    Raises:
        PlanError: the file cannot be read.
    """
    try:
        text = read_text(Path(path))
    except (OSError, ValueError) as error:
        raise PlanError(f"share.plan: cannot read {path}: {error}") from error
    return Plan.from_json(text)
