"""Sums over all processes that are in progress; all overlap settings consist of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Sum(Protocol):
    """A tensor that is being summed over all processes."""

    def wait(self) -> Tensor:
        """Waits for the sum and returns it."""
        ...


Start = Callable[[Tensor], Sum]
"""Function that starts the sum of a flat tensor, and owns the tensor from then on. All processes start sums in the same order."""


class ProcessGroupSum:
    """A `Sum` by an all-reduce of torch.distributed."""

    def __init__(self, tensor: Tensor, process_group: dist.ProcessGroup | None):
        self.tensor, self.work = tensor, dist.all_reduce(tensor, group=process_group, async_op=True)

    def wait(self) -> Tensor:
        """Waits for the sum and returns it."""
        assert self.work is not None
        self.work.wait()
        return self.tensor
