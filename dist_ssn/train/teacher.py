"""Distillation: a trained model's logits and hidden states as targets, in addition to the data's own.

    loss = (1 - w) · task + w · T² · KL(teacher at T ‖ student at T) + w_hidden · mean over modules of (student - teacher)²

Hidden states are compared without a projection, so both models' must have the same shape. Each process holds the whole teacher and
runs it on its own samples, so distillation costs memory and compute, and sends nothing.

Source: Hinton et al., arXiv 1503.02531 (logits); Romero et al., arXiv 1412.6550 (hidden states).
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_ssn.errors import UserError
from dist_ssn.files import read_text
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.train.build import share_as, start_model
from dist_ssn.train.checkpoint.store import load_model
from dist_ssn.train.data import Task, logits_of
from dist_ssn.train.models import MODELS
from dist_ssn.train.prune import with_thresholds
from dist_ssn.train.recipe.read import recipe_from_json
from dist_ssn.train.recipe.schema import DENSE, Recipe
from dist_ssn.train.recipe.sections import DistillConfig, ShareConfig


def dense_twin(recipe: Recipe) -> Recipe:
    """The recipe of the teacher that `distill.teacher: dense` trains: the same recipe without sharing."""
    name = f"{recipe.name}-teacher"
    return dataclasses.replace(recipe, name=name, share=ShareConfig(), distill=DistillConfig(), predicted=None)


def load_teacher(recipe: Recipe, task: Task, student: nn.Module) -> Teacher:
    """The teacher that a recipe names, from the last checkpoint of its run, on the device of `student`.

    Raises:
        UserError: the teacher's run cannot be read, or its outputs differ in shape from the student's.
    """
    folder = Path(recipe.distill.teacher or "")
    if recipe.distill.teacher == DENSE:
        twin = dense_twin(recipe)
        folder = Path(twin.output) / twin.name
    try:
        theirs = recipe_from_json(read_text(folder / "recipe.json"), str(folder / "recipe.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"distill.teacher: {folder / 'recipe.json'} cannot be read: {error}") from error
    if theirs.model not in MODELS and theirs.model != recipe.model:  # otherwise its folder could name any code to run
        raise UserError(
            f"distill.teacher: its model is {theirs.model!r}, and only a built-in model or this recipe's own "
            f"({recipe.model!r}) is built from a run's folder"
        )
    share, plan = theirs.share, folder / "plan.json"
    if plan.exists():  # the plan that the teacher was trained with
        share = ShareConfig(
            plan=str(plan), include=share.include, exclude=share.exclude, keep=share.keep, train=share.train
        )
    model = with_thresholds(share_as(start_model(theirs, task), share), theirs.prune)
    load_model(folder / "checkpoints", model, shared_plan(model))
    device = next(student.parameters()).device
    teacher = Teacher(recipe.distill, model.to(device), student)
    inputs, targets = task.batch(0, 1)
    teacher.check(student, inputs.to(device), targets.to(device))
    return teacher


class Teacher:
    """A trained model, and the loss that compares another model with it.

    Args:
        config: temperature, weights, and names of the modules whose outputs are compared.
        model: the teacher; its parameters are frozen.
        student: its hidden states are recorded in each forward.

    Raises:
        UserError: a name of `config.hidden` is not in both models.
    """

    def __init__(self, config: DistillConfig, model: nn.Module, student: nn.Module) -> None:
        self._config, self._model = config, model.eval().requires_grad_(False)
        self._theirs: dict[str, Tensor] = {}
        self._mine: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        known = dict(student.named_modules())
        both = [name for name, _ in model.named_modules() if name and name in known]
        for pattern in config.hidden:
            names = [name for name in both if fnmatchcase(name, pattern)]
            if not names:
                raise UserError(
                    f"distill.hidden: no module of both models is called {pattern!r}; there are {_some(both)}"
                )
            for name in names:
                for module, where in ((model.get_submodule(name), self._theirs), (known[name], self._mine)):
                    self._hooks.append(module.register_forward_hook(partial(_record, where, name)))

    def loss(self, task_loss: Tensor, outputs: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, right after the student's forward.

        Args:
            task_loss: loss of the data's own targets, a scalar.
            outputs: the student's.
            inputs: of the batch.
            targets: of the batch.
        """
        weight, temperature = self._config.weight, self._config.temperature
        with torch.no_grad():
            theirs = logits_of(self._model(inputs), targets).flatten(0, -2) / temperature
        mine = logits_of(outputs, targets).flatten(0, -2) / temperature
        divergence = F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
        loss = (1 - weight) * task_loss + weight * temperature**2 * divergence
        if self._config.hidden:
            parts = [F.mse_loss(self._mine[name], hidden) for name, hidden in self._theirs.items()]
            loss = loss + self._config.hidden_weight * torch.stack(parts).mean()
        self._mine.clear()
        self._theirs.clear()
        return loss

    def leave(self) -> None:
        """Stops recording hidden states."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def check(self, student: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Runs both models on one batch and compares shapes.

        Raises:
            UserError: the two models' logits or hidden states differ in shape.
        """
        was_training = student.training
        shapes = [logits_of(model(inputs), targets).shape for model in (student.eval(), self._model)]
        student.train(was_training)
        for name in self._theirs:
            if self._mine[name].shape != self._theirs[name].shape:
                raise UserError(
                    f"distill.hidden: {name} returns {tuple(self._mine[name].shape)} in the model and "
                    f"{tuple(self._theirs[name].shape)} in its teacher: name modules whose outputs have the same shape"
                )
        if shapes[0] != shapes[1]:
            raise UserError(
                f"distill.teacher: its logits are {tuple(shapes[1])} where the model's are {tuple(shapes[0])}: "
                "it must have been trained for the same classes or vocabulary"
            )
        self._mine.clear()
        self._theirs.clear()


def _record(where: dict[str, Tensor], name: str, module: nn.Module, _: object, output: Any) -> None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise UserError(f"distill.hidden: {name} returns a {type(first).__name__}, and must return a tensor")
    where[name] = first


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
