"""`Engine`: interface between a training loop and an engine, and the parts that all engines share."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.engines.overlap.delay import Delay
from dist_ssn.engines.overlap.exchange import Exchange
from dist_ssn.engines.whole_state import OptimizerState, load_whole_state, whole_state
from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import frozen_beside
from dist_ssn.sync.local_updates import LocalUpdates


class Engine(ABC):
    """Trains one model on several processes.

    An engine is made in two stages, because some engines replace parameters::

        module = SomeEngine.prepare(share(model, 0.1))                      # in place where it can be
        optimizer = AdamW(parameter_groups(module), lr=1e-3)
        engine = SomeEngine(module, optimizer, scheduler=…, clip_norm=1.0)

    One step::

        for micro in range(accumulation):
            last = micro == accumulation - 1
            with engine.accumulating(last):
                engine.backward(loss_of(engine.model(inputs)) / accumulation, last)
        engine.step()

    An engine of your own subclasses this, implements `accumulating` and `backward`, and adds its options to `__init__`. With one
    process, every engine trains like a loop without an engine.

    Args:
        model: shared or dense, on its device.
        optimizer: over the model's parameters, made after `share` and `prepare`.
        scheduler: stepped with the optimizer.
        clip_norm: global norm to which `step` clips the gradients; None does not clip.
        options: options of the engine.

    Raises:
        UserError: the model has nothing to train, or the optimizer holds parameters of another model.
    """

    replicated: bool = True
    """True if every process holds all parameters whole, so that they can be compared."""
    rank: int
    world_size: int
    module: nn.Module
    """The model itself: for evaluation, on all processes together."""
    model: nn.Module
    """The module to call for a forward in training."""
    optimizer: Optimizer

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        **options: Any,
    ) -> None:
        assert not options, f"options that the engine does not take: {options}"
        check_optimizer(model, optimizer, clip_norm)
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.world_size = dist.get_world_size() if joined else 1
        self.module = self.model = model
        self.optimizer, self.scheduler, self.clip_norm = optimizer, scheduler, clip_norm
        self._averaged = True
        """True if the current gradients are the mean over all processes."""
        self._exchange: Exchange | None = None
        """Averages gradients instead of the engine, for overlap settings other than "none"."""
        self.local: LocalUpdates | None = None
        """Averages the processes' changes once per round; None if gradients are averaged on every step."""

    @property
    def delay(self) -> Delay | None:
        """The exchange of overlap "delay"; None for other settings."""
        return self._exchange if isinstance(self._exchange, Delay) else None

    @staticmethod
    def prepare(model: nn.Module) -> nn.Module:
        """Replaces the parameters by those that the engine trains, before the optimizer is made.

        The base class replaces nothing: its parameters stay whole.

        Returns:
            The model.
        """
        return model

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; gradients are averaged only in the step's last one."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Computes the gradients of a micro-batch.

        Args:
            loss: scalar, the mean over this process's samples, divided by the number of micro-batches.
            last: it is the step's last micro-batch.
        """

    def step(self) -> Tensor | None:
        """Clips by the global norm, updates parameters and learning rate, drops the gradients.

        Returns:
            The global norm of the gradients before clipping (a scalar, not copied to the host); None without `clip_norm`.

        Raises:
            UserError: the last micro-batch was not marked as the last, so that the gradients are not averaged.
        """
        if not self._averaged:
            raise UserError("step() after accumulating(last=False): the step's last micro-batch needs last=True")
        norm = None if self.clip_norm is None else self._clip(self.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._exchange is not None:
            self._exchange.stepped()
        return norm

    def common(self) -> AbstractContextManager[None]:
        """Surrounds an evaluation, or a copy of the model: inside, all processes hold the same model.

        With local updates it is that of the last round, and training goes on as if nobody had looked.
        """
        return nullcontext() if self.local is None else self.local.anchored()

    def synchronize(self) -> bool:
        """Averages what local updates have not averaged yet; all processes call it.

        Returns:
            True if there was something to average.
        """
        return self.local is not None and self.local.synchronize()

    def _train_locally(self, model: nn.Module, sync: Mapping[str, Any], group: Any = None) -> None:
        """Begins local updates; from now on, processes hold parameters of their own between two rounds.

        Args:
            model: the module, or its wrapper over an island.
            sync: keyword arguments of `LocalUpdates`.
            group: see `LocalUpdates`.
        """
        self.local = LocalUpdates(model, self.optimizer, group=group, **sync)
        self.replicated = False

    def _clip(self, clip_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], clip_norm)

    def gathered(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Whole parameters and optimizer state, by name of the parameter.

        All processes call it; only rank 0's result is complete. In the base class every process holds everything, so nothing is
        sent.
        """
        return whole_state(self.module, self.optimizer, self.delay)

    def kept(self) -> dict[str, Tensor]:
        """The frozen parameters beside the banks of a model that keeps its values, whole, by name; all processes call it."""
        return {name: parameter.detach() for name, parameter in frozen_beside(self.module).items()}

    def scatter(self, parameters: dict[str, Tensor], optimizer: OptimizerState) -> None:
        """Loads the result of `gathered`, which every process holds whole."""
        load_whole_state(self.module, self.optimizer, parameters, optimizer, self.delay)


def check_optimizer(model: nn.Module, optimizer: Optimizer, clip_norm: float | None) -> None:
    """Checks the arguments of an engine.

    Raises:
        UserError: there is nothing to train, the optimizer holds parameters of another model, or clip_norm is not above 0.
    """
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError(
            f"the model ({type(model).__name__}) has no trainable parameters: requires_grad is False for all"
        )
    known = {id(p) for p in model.parameters()}
    held = [p for param_group in optimizer.param_groups for p in param_group["params"]]
    strangers = [p for p in held if id(p) not in known]
    if strangers:
        raise UserError(
            f"the optimizer holds {len(strangers)} of {len(held)} parameters that are not the model's (the first has "
            f"the shape {tuple(strangers[0].shape)}): make the optimizer after share(), from the model it will train"
        )
    forgotten = sorted(name for key, name in trainable.items() if key not in {id(p) for p in held})
    if forgotten:
        warnings.warn(
            f"{len(forgotten)} trainable parameters are not in the optimizer (the first is {forgotten[0]}): they are "
            "sent in each step but never change; give them to the optimizer or set requires_grad to False",
            stacklevel=3,
        )
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm must be above 0 or None, got {clip_norm!r}")
