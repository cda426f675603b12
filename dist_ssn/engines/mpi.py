"""MPI: mpi4py sends the gradients of each bank in a message of its own, and all others in one.

Source: mpi4py, Dalcin & Fang 2021, https://doi.org/10.1109/MCSE.2021.3083216; non-blocking collectives, MPI 3.1, section 5.12.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.comm.in_flight import waiting
from dist_ssn.comm.meter import book, purpose
from dist_ssn.engines.base import Engine
from dist_ssn.engines.overlap.exchange import make_exchange
from dist_ssn.engines.world.divergence import require_one_plan
from dist_ssn.engines.world.mpi import load_mpi
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import Overlap, least_alone, parse_overlap
from dist_ssn.sharing.bank import banks_of
from dist_ssn.sharing.bases import sent_at_the_start
from dist_ssn.sync.transport import MPITransport

PIECE_BYTES = 2**30
"""A message is sent in pieces of at most this size: before MPI 4, a count had to be below 2³¹."""


@dataclass
class _Message:
    """Gradients that are sent together: one bank's, or all others."""

    parameters: list[nn.Parameter]
    sum: MPISum | None = None
    """The sum in progress."""


class MPISum:
    """A flat tensor that is being summed over all processes of `comm`, in pieces; see `overlap.sums.Sum`."""

    def __init__(self, mpi: Any, comm: Any, tensor: Tensor, cuda_aware: bool):
        self._mpi, self._size = mpi, comm.size
        if tensor.dtype not in (torch.float32, torch.float64):  # types that MPI knows
            tensor = tensor.float()
        if tensor.is_cuda and cuda_aware:
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI does not wait for streams
        else:
            tensor = tensor.cpu()
        self._tensor = tensor
        self._requests = [
            comm.Iallreduce(mpi.IN_PLACE, piece if piece.is_cuda else piece.numpy(), mpi.SUM)
            for piece in tensor.split(max(1, PIECE_BYTES // tensor.element_size()))
        ]

    def wait(self) -> Tensor:
        """Waits for the sum, and books the waiting time in the active meters."""
        started = time.perf_counter()
        with waiting("all_reduce", "gradients"):
            self._mpi.Request.Waitall(self._requests)
        book("all_reduce", "gradients", self._tensor.nbytes, self._size, exposed=time.perf_counter() - started)
        return self._tensor


class MPIEngine(Engine):
    """Trains a model with one copy per process, started by `mpirun` or by Slurm's `srun --mpi=…`.

    Gradients are summed by `Iallreduce`. A message starts when its last gradient is final, in the middle of backward. In MPI all
    ranks must start collectives in the same order; it is the order in which gradients became final on rank 0 in the first step. The
    first step sends everything at its end. A parameter without a gradient on a rank counts as zero there.

    Args:
        model: see `Engine`.
        optimizer: see `Engine`.
        scheduler: see `Engine`.
        clip_norm: see `Engine`.
        cuda_aware: pass gradients on a CUDA device to MPI directly; otherwise they are copied to host memory.
        overlap: the overlap setting, see `dist_ssn.plan.overlap`.
        sync: as in `DDPEngine`; changes travel over MPI.

    Raises:
        UserError: mpi4py is not installed, or no MPI has started these processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        cuda_aware: bool = False,
        overlap: str | Overlap = "none",
        sync: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler=scheduler, clip_norm=clip_norm)
        self._mpi = load_mpi()
        if self._mpi.COMM_WORLD.size != self.world_size:
            raise UserError(
                f"engine 'mpi': MPI has {self._mpi.COMM_WORLD.size} processes and torch.distributed has {self.world_size}: "
                "start them by mpirun -n … or srun --mpi=…, not by torchrun"
            )
        self.cuda_aware = cuda_aware
        self._sends = False  # the current backward averages gradients
        self._started = 0  # number of this step's messages that have started, in order
        self._fired: Counter[nn.Parameter] = Counter()  # number of times that each gradient has grown in this backward
        self._final: Counter[nn.Parameter] | None = (
            None  # that number at the end of backward, known after the first step
        )
        self._ends: dict[nn.Parameter, int] = {}  # position of each gradient's last growth in this backward
        self._comm = self._mpi.COMM_WORLD.Dup()
        self._messages: list[_Message] = []
        if sync is not None:
            if parse_overlap(overlap).kind != "none":
                raise UserError("overlap is for gradients that are averaged on every step: leave it out with sync")
            if self.world_size > 1:
                with purpose("initialization"):
                    require_one_plan(model)
            return self._train_locally(model, sync, MPITransport(self._comm) if self.world_size > 1 else None)
        exchange_comm = self._mpi.COMM_WORLD.Dup()  # an exchange's collectives have an order of their own
        self._exchange = make_exchange(
            model, parse_overlap(overlap), lambda tensor: self._sum(tensor, exchange_comm), self.world_size
        )
        self._messages = _messages_of(model, self._exchange.parameters if self._exchange is not None else set())
        if self.world_size > 1:
            with purpose("initialization"):
                require_one_plan(model)
                for tensor in sent_at_the_start(model):
                    dist.broadcast(tensor.detach(), src=0)
            for message in self._messages:
                for parameter in message.parameters:
                    parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; gradients are sent only in the step's last one."""
        self._sends = last and self.world_size > 1 and self.local is None
        try:
            yield
        finally:
            self._sends = False

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Computes the gradients of a micro-batch, see `Engine.backward`."""
        self._averaged = False
        self._fired.clear()
        if self._sends and self._exchange is not None:
            self._exchange.arm(loss)
        loss.backward()
        if self._sends:
            self._finish()
        self._averaged = last

    def _on_gradient(self, parameter: Tensor) -> None:
        """Hook of a gradient that has grown: starts the messages that are complete, in order."""
        if not self._sends:
            return
        assert isinstance(parameter, nn.Parameter)
        self._fired[parameter] += 1
        self._ends[parameter] = sum(self._fired.values())
        if self._final is None:
            return
        if self._fired[parameter] > self._final[parameter] and any(
            parameter is p for message in self._messages[: self._started] for p in message.parameters
        ):
            raise UserError(
                "a gradient grew after it was sent: this step uses a reentrantly checkpointed part more often than the first "
                "step did; checkpoint with use_reentrant=False"
            )
        while self._started < len(self._messages):
            parameters = self._messages[self._started].parameters
            if any(self._fired[p] < self._final[p] for p in parameters):
                return
            self._start()

    def _sum(self, tensor: Tensor, comm: Any = None) -> MPISum:
        return MPISum(self._mpi, comm or self._comm, tensor, self.cuda_aware)

    def _start(self) -> None:
        message = self._messages[self._started]
        self._started += 1
        for parameter in message.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad.reshape(-1) for parameter in message.parameters if parameter.grad is not None]
        message.sum = self._sum(gradients[0] if len(gradients) == 1 else torch.cat(gradients))

    def _finish(self) -> None:
        """Starts the remaining messages, waits for all, and replaces the gradients by means."""
        while self._started < len(self._messages):
            self._start()
        for message in self._messages:
            assert message.sum is not None
            mean = message.sum.wait() / self.world_size
            for parameter, part in zip(
                message.parameters, mean.split([p.numel() for p in message.parameters]), strict=True
            ):
                assert parameter.grad is not None
                parameter.grad.copy_(part.view_as(parameter))
            message.sum = None
        self._started = 0
        if self._final is None:
            self._learn()

    def _learn(self) -> None:
        """Records, after the first backward, how often gradients grow, and the order of rank 0's messages."""
        self._final = self._fired.copy()
        ends = [max(self._ends.get(p, 0) for p in message.parameters) for message in self._messages]
        order = self._comm.bcast(sorted(range(len(ends)), key=ends.__getitem__))
        self._messages = [self._messages[place] for place in order]


def _messages_of(model: nn.Module, apart: set[nn.Parameter]) -> list[_Message]:
    """One message per large bank, and one of all other gradients.

    Args:
        model: shared or dense.
        apart: parameters that an exchange averages.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p not in apart]
    of_bank = {bank.bank for bank in banks_of(model)}
    least = least_alone([bank.nbytes for bank in of_bank])
    banks = [p for p in trained if p in of_bank and p.nbytes >= least]
    rest = [p for p in trained if p not in of_bank or p.nbytes < least]
    return [_Message([bank]) for bank in banks] + ([_Message(rest)] if rest else [])
