"""DistributedDataParallel, set up for models whose weights live in a few flat banks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.comm.meter import purpose
from dist_ssn.engines.base import Engine
from dist_ssn.engines.overlap.exchange import make_exchange
from dist_ssn.engines.overlap.sums import ProcessGroupSum
from dist_ssn.engines.world.divergence import require_one_plan
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import Overlap, bucket_bytes, check_compress, parse_overlap
from dist_ssn.sharing.bank import banks_of
from dist_ssn.sharing.bases import sent_at_the_start
from dist_ssn.sync.islands import islands_of
from dist_ssn.torch_private import ignore_in_ddp

MIB = 2**20


class DDPEngine(Engine):
    """Trains a model with one copy per process; gradients are averaged in backward.

    Call `model` for a forward in training: it is the wrapper, or the model itself with one process. `module` is always the model
    itself: use it for evaluation (the wrapper broadcasts buffers in each forward).

    Args:
        model: see `Engine`.
        optimizer: see `Engine`.
        scheduler: see `Engine`.
        clip_norm: see `Engine`.
        static_graph: every step uses the same parameters in the same order; needed with reentrant activation checkpointing of
            layers that share a bank.
        find_unused_parameters: for models that leave some parameters out of some steps (costs one more all-reduce of 4 bytes
            per parameter tensor).
        bucket_mb: MiB at which a bucket is closed; None chooses by `plan.overlap.bucket_bytes`.
        overlap: the overlap setting, see `dist_ssn.plan.overlap`. With "segments" and "sums" the banks are sent outside of DDP.
            With "delay" all gradients are, and buffers are not synchronized.
        compress: "fp16" sends gradients as 16-bit floats, by torch's own hook, which first divides them by the number of
            processes.
        sync: keyword arguments of `dist_ssn.LocalUpdates`: gradients stay local, and once per round the processes average their
            changes. None averages gradients on every step.
        within: "node": DDP averages gradients within each node on every step, and local updates run between the nodes.

    Raises:
        UserError: see `Engine`; or an option has an impossible value.
    """

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
        sync: Mapping[str, Any] | None = None,
        within: str | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler=scheduler, clip_norm=clip_norm)
        if bucket_mb is not None and not bucket_mb > 0:
            raise UserError(f"bucket_mb must be above 0 or None, got {bucket_mb!r}")
        self._last = True
        """True if the current micro-batch is the step's last, by `accumulating`."""
        self._learning = static_graph
        """True until DDP's first backward."""
        setting = parse_overlap(overlap)
        check_compress(compress, setting)
        # An exchange has a process group of its own, because its collectives have an order of their own.
        needs_group = dist.is_initialized() and setting.kind != "none"
        process_group: Any = dist.new_group() if needs_group else None
        self._exchange = make_exchange(model, setting, lambda t: ProcessGroupSum(t, process_group), self.world_size)
        if sync is not None and (setting.kind != "none" or compress != "none"):
            raise UserError(
                "overlap and compress are for gradients that are averaged on every step: leave them out with sync"
            )
        if sync is not None and within is None:
            with purpose("initialization"):
                if self.world_size > 1:
                    require_one_plan(model)
            return self._train_locally(model, sync)
        islands = None if sync is None or within is None else islands_of(within)
        if self.world_size == 1:
            return
        apart = self._exchange.parameters if self._exchange is not None else set()
        trainable = [p for p in model.parameters() if p.requires_grad and p not in apart]
        banks = {name: p for name, p in model.named_parameters() if p in apart}  # in one order on all ranks
        with purpose("initialization"):
            require_one_plan(model)
            for tensor in banks.values() if trainable else sent_at_the_start(model):
                dist.broadcast(tensor.detach(), src=0)
            if not trainable:
                return  # DDP rejects a model without parameters to average
            if not ignore_in_ddp(model, list(banks)) and banks:
                raise UserError(
                    f"DDP of torch {torch.__version__} cannot leave banks to overlap {setting.kind!r}: use 'none'"
                )
            limit = _bucket_limit(model, trainable) if bucket_mb is None else bucket_mb * MIB
            options = {"static_graph": static_graph, "find_unused_parameters": find_unused_parameters}
            self.model = _wrapped(model, limit, None if islands is None else islands.within, options)
            if compress == "fp16":
                self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        if sync is not None and islands is not None:
            self._train_locally(self.model, sync, islands.across)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; gradients are sent only in the step's last one."""
        wrapper = self.model if isinstance(self.model, DistributedDataParallel) else None
        # Trap: with static_graph, DDP's very first backward must be outside of no_sync (else an internal assertion fails). That
        # micro-batch is averaged once more than needed, which changes no gradient.
        local = wrapper is not None and not last and not self._learning
        self._learning = False
        outer, self._last = self._last, last
        try:
            with wrapper.no_sync() if wrapper is not None and local else nullcontext():
                yield
        finally:
            self._averaged = last
            self._last = outer

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Computes the gradients of a micro-batch, averaged if it is the last.

        Args:
            loss: scalar, the mean over this process's samples, divided by the number of micro-batches.
            last: it is the step's last micro-batch.

        Raises:
            UserError: `last` contradicts the `accumulating` around it, where DDP's forward has already decided what to send.
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


def _wrapped(
    model: nn.Module, limit: float | None, process_group: Any, options: Mapping[str, Any]
) -> DistributedDataParallel:
    """The model in a DistributedDataParallel that closes a bucket at `limit` bytes; None for DDP's default."""
    # DDP's default broadcasts buffers before each forward if the model has any; the argument for it changes its name between
    # releases.
    return DistributedDataParallel(
        model,
        bucket_cap_mb=None if limit is None else limit / MIB,  # pyright: ignore[reportArgumentType]
        gradient_as_bucket_view=True,
        process_group=process_group,
        **options,
    )


def _bucket_limit(model: nn.Module, parameters: list[nn.Parameter]) -> int | None:
    """Bytes at which DDP should close a bucket of the gradients of these parameters."""
    banks = {bank.bank for bank in banks_of(model)}
    own = sum(p.nbytes for p in parameters if p not in banks)
    return bucket_bytes([p.nbytes for p in parameters if p in banks], own)
