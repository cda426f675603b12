"""DistributedDataParallel, set up for models whose weights live in a few flat banks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.comm.meter import purpose
from dist_ssn.engines.base import OptimizerState, check_optimizer, load_whole_state, whole_state
from dist_ssn.engines.overlap.delay import Delay
from dist_ssn.engines.overlap.exchange import GroupSum, make_exchange
from dist_ssn.engines.world.divergence import check_plans
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import Overlap, bucket_bytes, check_compress, parse_overlap

MIB = 2**20
_BANK = re.compile(r"(^|\.)dist_ssn\.[^.]+\.bank$")


def bucket_limit(parameters: Iterable[tuple[str, nn.Parameter]]) -> int | None:
    """Bytes at which DDP should close a bucket of these gradients, by `plan.overlap.bucket_bytes`."""
    banks, own = [], 0
    for name, parameter in parameters:
        if _BANK.search(name):
            banks.append(parameter.nbytes)
        else:
            own += parameter.nbytes
    return bucket_bytes(banks, own)


class DDPEngine:
    """Trains a model with one copy per process, whose gradients are averaged in backward.

    model: shared or not, on its device. optimizer: over the model's parameters, made after `share`.
    scheduler: stepped with the optimizer. clip_norm: global norm to which `step` clips; None: no clipping.
    static_graph: every step uses the same parameters in the same order; needed with reentrant activation
    checkpointing, where one bank has several users. find_unused_parameters: for models that leave some parameters
    out of some steps (costs one more all-reduce of 4 bytes per parameter tensor).
    bucket_mb: MiB at which a bucket is closed, instead of our own choice.
    overlap: how gradients travel while processes compute, see `dist_ssn.plan.overlap`. With "segments" and "sums" the banks
    travel beside DDP; with "delay" DDP has nothing left to do, and buffers are each process's own.
    compress: "fp16" sends gradients as 16-bit floats, by torch's own hook; they are divided by the number of processes first.

    .model is what to call for a forward in training: the wrapper, or the model itself when there is one process.
    .module is always the model itself: use it for evaluation (the wrapper broadcasts buffers in each forward).

    One step::

        for micro in range(accumulation):
            last = micro == accumulation - 1
            with engine.accumulating(last):
                engine.backward(loss_of(engine.model(inputs)) / accumulation, last)
        engine.step()

    Raises: UserError when the model has nothing to train, or the optimizer holds parameters of another model.
    """

    replicated = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        bucket_mb: float | None = None,
        overlap: str | Overlap = "none",
        compress: str = "none",
    ) -> None:
        check_optimizer(model, optimizer, clip_norm)
        if bucket_mb is not None and not bucket_mb > 0:
            raise UserError(f"bucket_mb must be above 0 or None, got {bucket_mb!r}")
        self.module = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.world_size = dist.get_world_size() if joined else 1
        self.model: nn.Module = model
        self._last = True  # what `accumulating` said: does the backward now under way end in averaged gradients?
        self._averaged = True  # are the gradients that exist now the average over all processes?
        self._learning = static_graph  # does DDP still have to see its first backward?
        way = parse_overlap(overlap)
        check_compress(compress, way)
        group: Any = (
            dist.new_group() if joined and way.kind != "none" else None
        )  # what it sends keeps an order of its own
        self._exchange = make_exchange(model, way, lambda tensor: GroupSum(tensor, group), self.world_size)
        self.delay = self._exchange if isinstance(self._exchange, Delay) else None
        if self.world_size > 1:
            apart = self._exchange.parameters if self._exchange is not None else set()
            trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p not in apart]
            banks = {name: p for name, p in model.named_parameters() if p in apart}  # in one order on all ranks
            with purpose("initialization"):
                check_plans(model)
                for tensor in banks.values() if trainable else (*model.parameters(), *model.buffers()):
                    dist.broadcast(tensor.detach(), src=0)
                if not trainable:
                    return  # DDP refuses a model of which it has nothing to average
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(banks))
                limit = bucket_limit(trainable) if bucket_mb is None else bucket_mb * MIB
                # Buffers are broadcast before each forward only if the model has any, which is DDP's default; the
                # argument for it changes its name between releases.
                self.model = DistributedDataParallel(
                    model,
                    bucket_cap_mb=None if limit is None else limit / MIB,  # pyright: ignore[reportArgumentType]
                    gradient_as_bucket_view=True,
                    static_graph=static_graph,
                    find_unused_parameters=find_unused_parameters,
                )
                if compress == "fp16":
                    self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)

    @staticmethod
    def prepare(model: nn.Module) -> nn.Module:
        """The model as it is: DDP works on whole parameters."""
        return model

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Put around forward and backward of one micro-batch: nothing is sent unless it is the step's last."""
        wrapper = self.model if isinstance(self.model, DistributedDataParallel) else None
        # Trap: with static_graph, DDP must see its very first backward outside of no_sync (else an internal assertion
        # fails). That micro-batch is averaged once more than needed, which changes no gradient.
        local = wrapper is not None and not last and not self._learning
        self._learning = False
        outer, self._last = self._last, last
        try:
            with wrapper.no_sync() if wrapper is not None and local else nullcontext():
                yield
        finally:
            self._averaged = last
            self._last = outer

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Compute gradients of `loss` (a scalar: the mean over this process's samples), averaged if `last`.

        With accumulation, divide the loss by the number of micro-batches.

        Raises: UserError when `last` contradicts the `accumulating` around it: DDP decides in forward what it sends.
        """
        if last != self._last:
            raise UserError(
                f"backward(last={last}) inside accumulating(last={self._last}): "
                f"put forward and backward inside `with engine.accumulating(last={last})`"
            )
        self._averaged = last
        if last and self._exchange is not None:
            self._exchange.arm(loss)
        loss.backward()

    def step(self) -> torch.Tensor | None:
        """Clip, update the parameters and the learning rate, drop the gradients.

        Returns: the global norm of the gradients before clipping (a scalar tensor, not copied to the host), or None
        without clip_norm.
        Raises: UserError when the last micro-batch was not marked as such: the processes would drift apart.
        """
        if not self._averaged:
            raise UserError("step() after accumulating(last=False): the step's last micro-batch needs last=True")
        norm = None
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], self.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._exchange is not None:
            self._exchange.stepped()
        return norm

    def gathered(self) -> tuple[dict[str, torch.Tensor], OptimizerState]:
        """Every process holds everything: no collective."""
        return whole_state(self.module, self.optimizer, self.delay)

    def scatter(self, parameters: dict[str, torch.Tensor], optimizer: OptimizerState) -> None:
        load_whole_state(self.module, self.optimizer, parameters, optimizer, self.delay)
