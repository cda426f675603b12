"""What the ways to overlap communication have in common: a sum over all processes that is under way, and who makes use of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.engines.overlap.delay import Delay
from dist_ssn.engines.overlap.pieces import PieceSender
from dist_ssn.plan.overlap import Overlap, least_alone
from dist_ssn.sharing.bank import Bank


class Sum(Protocol):
    """A tensor that is being summed over all processes."""

    def wait(self) -> Tensor:
        """The sum, when it is there."""
        ...


Start = Callable[[Tensor], Sum]
"""Starts to sum a flat tensor, which is the callee's from then on. All processes start equal ones in equal order."""


class GroupSum:
    """A `Sum` by an all-reduce of torch.distributed."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup | None):
        self.tensor, self.work = tensor, dist.all_reduce(tensor, group=group, async_op=True)

    def wait(self) -> Tensor:
        assert self.work is not None
        self.work.wait()
        return self.tensor


Exchange = PieceSender | Delay
"""Who averages the gradients of its `.parameters` in place of the engine: `.arm(loss)` before a step's last backward, `.stepped()`
after the step."""


def make_exchange(model: nn.Module, overlap: Overlap, start: Start, world_size: int) -> Exchange | None:
    """Who sends gradients as `overlap` says; None where that is the engine's own way."""
    if overlap.kind == "none" or world_size == 1:
        return None
    if overlap.kind == "delay":
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return Delay(parameters, overlap.correction, start, world_size)
    banks = [module for module in model.modules() if isinstance(module, Bank) and module.bank.requires_grad]
    least = least_alone([bank.bank.nbytes for bank in banks])
    large = [bank for bank in banks if bank.bank.nbytes >= least]
    return PieceSender(large, overlap, start, world_size) if large else None
