"""Sums over all processes that are in progress: what every overlap setting is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Sum(Protocol):
    """A tensor that is being summed over all processes."""

    def wait(self) -> Tensor:
        """The sum, when it is there."""
        ...


Start = Callable[[Tensor], Sum]
"""Starts to sum a flat tensor, which is the callee's from then on. All processes start equal ones in equal order."""


class ProcessGroupSum:
    """A `Sum` by an all-reduce of torch.distributed."""

    def __init__(self, tensor: Tensor, process_group: dist.ProcessGroup | None):
        self.tensor, self.work = tensor, dist.all_reduce(tensor, group=process_group, async_op=True)

    def wait(self) -> Tensor:
        """The sum, when it is there."""
        assert self.work is not None
        self.work.wait()
        return self.tensor
