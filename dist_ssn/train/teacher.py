"""Distillation: a trained model's logits and hidden states as targets beside the data's own.

    loss = (1 - w) · task + w · T² · KL(teacher at T ‖ student at T) + w_hidden · mean over modules of (student - teacher)²

Logits after Hinton et al., arXiv 1503.02531; hidden states after Romero et al., arXiv 1412.6550, without a projection: they must
be of one shape. Each process has the whole teacher and asks it about its own samples, so it costs memory and computing, and no
byte on the network.
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
from dist_ssn.train.build import share_as
from dist_ssn.train.checkpoint.store import load_model
from dist_ssn.train.data import Task, logits_of
from dist_ssn.train.models import MODELS, build_model
from dist_ssn.train.prune import with_thresholds
from dist_ssn.train.recipe.read import recipe_from_json
from dist_ssn.train.recipe.schema import DENSE, DistillConfig, Recipe, ShareConfig


def dense_twin(recipe: Recipe) -> Recipe:
    """The run that `distill.teacher: dense` asks for: the recipe without sharing."""
    name = f"{recipe.name}-teacher"
    return dataclasses.replace(recipe, name=name, share=ShareConfig(), distill=DistillConfig(), predicted=None)


def load_teacher(recipe: Recipe, task: Task, student: nn.Module) -> Teacher:
    """The teacher that a recipe names, from the last checkpoint of its run, on the device of `student`.

    Raises:
        UserError: its run cannot be read, or its outputs are not of the student's shapes.
    """
    folder = Path(recipe.distill.teacher or "")
    if recipe.distill.teacher == DENSE:
        twin = dense_twin(recipe)
        folder = Path(twin.output) / twin.name
    try:
        theirs = recipe_from_json(read_text(folder / "recipe.json"), str(folder / "recipe.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"distill.teacher: {folder / 'recipe.json'} cannot be read: {error}") from error
    if theirs.model not in MODELS and theirs.model != recipe.model:  # else its folder could name any code to run
        raise UserError(
            f"distill.teacher: its model is {theirs.model!r}, and only a built-in model or this recipe's own "
            f"({recipe.model!r}) is built from a run's folder"
        )
    share, plan = theirs.share, folder / "plan.json"
    if plan.exists():  # as it was found then, wherever it came from
        share = ShareConfig(plan=str(plan))
    model = with_thresholds(share_as(build_model(theirs.model, theirs.model_args, task), share), theirs.prune)
    load_model(folder / "checkpoints", model, shared_plan(model))
    device = next(student.parameters()).device
    teacher = Teacher(recipe.distill, model.to(device), student)
    inputs, targets = task.batch(0, 1)
    teacher.check(student, inputs.to(device), targets.to(device))
    return teacher


class Teacher:
    """A trained model, and the comparison of another with it.

    Args:
        model: the teacher; it is not changed any more.
        student: its hidden states are taken down whenever it runs.

    Raises:
        UserError: a name of `config.hidden` is not in both.
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
                    self._hooks.append(module.register_forward_hook(partial(_take_down, where, name)))

    def loss(self, task_loss: Tensor, outputs: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch on which the student has just run.

        Args:
            task_loss: what the data's own targets ask for, a scalar.
            outputs: the student's.
        """
        weight, temperature = self._config.weight, self._config.temperature
        with torch.no_grad():
            told = logits_of(self._model(inputs), targets).flatten(0, -2) / temperature
        said = logits_of(outputs, targets).flatten(0, -2) / temperature
        apart = F.kl_div(said.log_softmax(-1), told.log_softmax(-1), reduction="batchmean", log_target=True)
        loss = (1 - weight) * task_loss + weight * temperature**2 * apart
        if self._config.hidden:
            parts = [F.mse_loss(self._mine[name], theirs) for name, theirs in self._theirs.items()]
            loss = loss + self._config.hidden_weight * torch.stack(parts).mean()
        self._mine.clear()
        self._theirs.clear()
        return loss

    def leave(self) -> None:
        """Takes nothing down any more."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def check(self, student: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Raises: UserError, where the two models' logits or hidden states differ in shape."""
        was_training = student.training
        shapes = [logits_of(model(inputs), targets).shape for model in (student.eval(), self._model)]
        student.train(was_training)
        for name in self._theirs:
            if self._mine[name].shape != self._theirs[name].shape:
                raise UserError(
                    f"distill.hidden: {name} makes {tuple(self._mine[name].shape)} in the model and "
                    f"{tuple(self._theirs[name].shape)} in its teacher: name modules whose outputs are of one shape"
                )
        if shapes[0] != shapes[1]:
            raise UserError(
                f"distill.teacher: its logits are {tuple(shapes[1])} where the model's are {tuple(shapes[0])}: "
                "it must have been trained for the same classes or vocabulary"
            )
        self._mine.clear()
        self._theirs.clear()


def _take_down(where: dict[str, Tensor], name: str, module: nn.Module, _: object, output: Any) -> None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise UserError(f"distill.hidden: {name} returns a {type(first).__name__}, and must return a tensor")
    where[name] = first


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
