"""The caller's own model, loss and batches as the job of a search."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dist_ssn.engines import World
from dist_ssn.errors import DataError, ShareError, UserError, describe
from dist_ssn.plan import Plan
from dist_ssn.sharing.attach import share
from dist_ssn.sharing.layers import SharedLayer
from dist_ssn.sharing.optimizer_groups import parameter_groups
from dist_ssn.train.evaluate import equal_buffers

Loss = Callable[[nn.Module, Any], Tensor]
LEARNING_RATE = 1e-3


def adamw(model: nn.Module) -> Optimizer:
    """The default optimizer of a search, that of a recipe without its schedule."""
    return AdamW(parameter_groups(model, lr=LEARNING_RATE), lr=LEARNING_RATE)


class OwnJob:
    """A `Job` of the caller's objects; each run trains a deep copy of the model.

    Args:
        model: dense; is not changed.
        loss: (model, batch) → scalar.
        batches: one for each step of the longest run.
        held_out: batches of the validation loss.
        optimizer: model → optimizer.
        steps: length of the longest run.
        seed: of the random numbers of each step.
        select: the arguments include and exclude of `share`.
        world: this process among the job's.
    """

    accumulation = 1
    clip_norm: float | None = None

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Any],
        held_out: Sequence[Any],
        *,
        optimizer: Callable[[nn.Module], Optimizer],
        steps: int,
        seed: int,
        select: dict[str, Any],
        world: World,
    ):
        self.model, self.call, self.batches, self.held_out = model, loss, batches, held_out
        self.optimizer, self.steps, self.seed, self.select, self.world = optimizer, steps, seed, select, world

    def make(self, plan: Plan | None, steps: int) -> tuple[nn.Module, Optimizer, None]:
        """See `Job`; the learning rate stays as the optimizer has it."""
        torch.manual_seed(self.seed)  # a caller's optimizer may draw
        model = self.copy()
        if plan is not None:
            share(model, plan=plan, **self.select)
        return model, self.optimizer(model), None

    def copy(self) -> nn.Module:
        """A deep copy of the model in training, without gradients, and with the values of rank 0.

        Raises:
            ShareError: the model cannot be copied.
        """
        try:
            model = copy.deepcopy(self.model)
        except Exception as error:  # whatever a model may raise
            raise ShareError(
                f"search trains copies, and {type(self.model).__name__} cannot be copied by copy.deepcopy: {describe(error)}"
            ) from error
        model.zero_grad(set_to_none=True)
        if self.world.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        return model.train()

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """See `Job`; only measurements of time (network, max_seconds) use a batch twice in one run."""
        return self.call(model, self.batches[step % len(self.batches)])

    def validation_loss(self, model: nn.Module) -> float:
        """See `Job`; each batch has the same weight."""
        equal_buffers(model, self.world)
        model.eval()  # with gradients, which a loss may use, such as a penalty of a gradient's norm
        losses = [self.call(model, batch).detach().double() for batch in self.held_out]
        model.train()
        mean = torch.stack(losses).mean()
        if self.world.world_size > 1:
            dist.all_reduce(mean)
        return float(mean) / self.world.world_size


def require_dense(model: Any) -> None:
    """Checks that the model is one that `share` takes.

    Raises:
        UserError: it is no module, is wrapped for training, or is shared already.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"search() takes a model, got an object of type {type(model).__name__}: search(model, loss, batches, budget), or "
            "dist_ssn.mapping_search.search_recipe(recipe)"
        )
    kind = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ShareError(
            f"the model is wrapped in a {kind}: search with the module inside, model.module, then share it"
        )
    if any(isinstance(module, SharedLayer) for module in model.modules()):
        raise ShareError(
            f"{kind} is shared already: search with the dense model, then share(model, plan=plan); "
            "dist_ssn.materialize(model) makes a shared model dense"
        )


def read_batches(batches: Iterable[Any], train: int, held_out: int, method: str) -> tuple[list[Any], list[Any]]:
    """The first batches, each read once.

    Args:
        batches: a loader, a list, or any other iterable, which may be endless.
        train: number of batches for training.
        held_out: number of batches after them, for the validation loss.
        method: name of the method, for the message.

    Returns:
        (batches for training, held-out batches).

    Raises:
        DataError: there are fewer.
    """
    if not isinstance(batches, Iterable):
        raise DataError(f"batches is of type {type(batches).__name__}: give a DataLoader, a list, or another iterable")
    wanted = train + held_out
    kept = list(itertools.islice(batches, wanted))
    if len(kept) < wanted:
        parts = f"{train} to train on" + (f" and {held_out} held out" if held_out else "")
        remedy = "; itertools.chain and itertools.cycle repeat a loader" if kept else ""
        fewer = "; short_steps (or steps, for auto) asks for fewer" if train > 1 else ""
        raise DataError(
            f"search: batches has {len(kept)}, and the method {method} needs {wanted}: {parts}{fewer}{remedy}"
        )
    return kept[:train], kept[train:]


def check_loss(job: OwnJob, weights: Sequence[str]) -> None:
    """Computes the first loss and its gradient, on a copy of the dense model.

    Args:
        job: the caller's objects.
        weights: names of the weights that a search groups.

    Raises:
        UserError: the loss fails, is no scalar, is not finite, or does not depend on the model that it is passed.
    """
    model = job.copy()
    try:
        loss: Any = job.loss(model, 0, 0)
    except UserError:
        raise
    except Exception as error:  # whatever a caller's function may raise
        raise UserError(f"search: loss(model, batch) fails on the first batch: {describe(error)}") from error
    if not isinstance(loss, Tensor) or loss.dim() or loss.is_complex():
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise UserError(
            f"search: loss(model, batch) must return a scalar tensor, got {got}: return the batch's mean loss"
        )
    if not loss.requires_grad:
        raise UserError(
            "search: loss(model, batch) has no gradient: return it before .detach(), .item(), torch.no_grad() or backward()"
        )
    if not math.isfinite(value := loss.detach().item()):
        raise UserError(f"search: loss(model, batch) is {value} on the first batch: look for the cause in the data")
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in weights], allow_unused=True)
    if all(gradient is None for gradient in found):
        raise UserError(
            "search: loss(model, batch) gives no gradient to the weights of the model that it is passed, a copy: call its first "
            "argument, and no model from outside"
        )
