"""FSDP2 (`fully_shard`): every process keeps a part of each bank and its optimizer state; banks are gathered once per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.comm.meter import purpose
from dist_ssn.engines.base import Engine
from dist_ssn.engines.whole_state import OptimizerState, load_whole_state, optimizer_state_by_index, whole_state
from dist_ssn.engines.world.divergence import require_one_plan
from dist_ssn.engines.world.join import is_distributed
from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import sent_at_the_start


class FSDPEngine(Engine):
    """Trains a model whose parameters `prepare` has sharded.

    The banks belong to FSDP2's root: they are gathered before a step's first forward and stay gathered until its last backward,
    for any number of layers and micro-batches. With one process nothing is sharded.

    Args:
        model: see `Engine`; sharded by `prepare`.
        optimizer: see `Engine`.
        scheduler: see `Engine`.
        clip_norm: see `Engine`.

    Raises:
        UserError: `prepare` was not called; or see `Engine`.
    """

    replicated = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        if is_distributed() and not isinstance(model, FSDPModule):
            raise UserError(
                "the model is not sharded yet: model = FSDPEngine.prepare(model) comes before the optimizer is made"
            )
        super().__init__(model, optimizer, scheduler=scheduler, clip_norm=clip_norm)

    @staticmethod
    def prepare(
        model: nn.Module, *, mesh: DeviceMesh | None = None, mp_policy: MixedPrecisionPolicy | None = None
    ) -> nn.Module:
        """Shards `model` in place, after all ranks have received rank 0's parameters and buffers.

        Args:
            model: shared or dense, on its device.
            mesh: one dimension to shard over all its processes, two to replicate over the first (HSDP); None: all processes.
            mp_policy: the dtypes of gathered parameters and of the reduction.

        Returns:
            The model.

        Raises:
            ShareError: the ranks' models follow different plans. All ranks raise it.
        """
        if not is_distributed():
            return model
        with purpose("initialization"):
            require_one_plan(model)
            for tensor in sent_at_the_start(model):
                if not isinstance(tensor, DTensor):  # a block that the user has sharded already
                    dist.broadcast(tensor.detach(), src=0)
            # Trap: resharding after forward would empty the banks, from which backward makes each weight again.
            fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=mp_policy or MixedPrecisionPolicy())
            assert isinstance(model, FSDPModule)
            # PyTorch 2.8's gloo takes the mean of float32 and 16-bit gradients for their sum.
            model.set_force_sum_reduction_for_comms(True)
        return model

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; gradients stay whole and local until the step's last one."""
        if isinstance(self.module, FSDPModule):
            self.module.set_is_last_backward(last)
            self.module.set_requires_gradient_sync(last)
            self.module.set_reshard_after_backward(last)
        yield

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Computes the gradients of a micro-batch, see `Engine.backward`."""
        loss.backward()

    def _clip(self, clip_norm: float) -> Tensor:
        with purpose("gradients"):  # the norm is over all processes
            norm = super()._clip(clip_norm)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gathered(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Whole parameters and optimizer state on the CPU; one all-gather per tensor."""
        self._reshard()
        parameters, state = whole_state(self.module, self.optimizer)
        return (
            {name: _whole(value) for name, value in parameters.items()},
            {name: {key: _whole(value) for key, value in entries.items()} for name, entries in state.items()},
        )

    def kept(self) -> dict[str, Tensor]:
        """See `Engine.kept`; one all-gather per tensor."""
        self._reshard()
        return {name: _whole(value) for name, value in super().kept().items()}

    def scatter(self, parameters: dict[str, Tensor], optimizer: OptimizerState) -> None:
        """Loads this process's part of the whole tensors; nothing is sent."""
        self._reshard()
        if not isinstance(self.module, FSDPModule):
            return load_whole_state(self.module, self.optimizer, parameters, optimizer)
        mine = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(_part(parameters[name], parameter))
        parts = {
            name: {key: _part(value, mine[name]) for key, value in entries.items()}
            for name, entries in optimizer.items()
        }
        by_index = optimizer_state_by_index(self.module, self.optimizer, parts)
        self.optimizer.load_state_dict({"state": by_index, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _reshard(self) -> None:
        """Frees banks that an evaluation has left gathered, and makes the sharded ones the model's parameters again."""
        if isinstance(self.module, FSDPModule):
            for module in self.module.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if isinstance(value, Tensor) else value


def _part(value: Any, parameter: Tensor) -> Any:
    """This process's part of a tensor with the parameter's shape; other values unchanged."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    device = parameter.device_mesh.device_type
    return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
