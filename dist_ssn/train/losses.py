"""The training loss, summed on the device so that the host waits only when it reads the sum."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max


class Losses:
    """Sum of the losses since the last `take`, and the first step whose loss was not finite."""

    def __init__(self, device: torch.device):
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first_bad = torch.tensor(_NEVER, device=device)
        self._count = 0

    def add(self, step: int, loss: Tensor) -> None:
        """Adds this rank's loss of a step, a scalar."""
        self._sum += loss
        bad = torch.where(torch.isfinite(loss), self._first_bad, torch.full_like(self._first_bad, step))
        self._first_bad = torch.minimum(self._first_bad, bad)
        self._count += 1

    def take(self, ranks: int) -> tuple[float, int | None]:
        """The mean loss since the last call; costs at most two small collectives, the same ones on every rank.

        Args:
            ranks: number of ranks.

        Returns:
            (mean over all ranks and steps, the first step whose loss was not finite on any rank, or None).
        """
        if ranks > 1:
            dist.all_reduce(self._sum)
        mean = self._sum.item() / (self._count * ranks)
        self._sum.zero_()
        self._count = 0
        if math.isfinite(mean):
            return mean, None
        if ranks > 1:
            dist.all_reduce(self._first_bad, op=dist.ReduceOp.MIN)
        return mean, int(self._first_bad.item())
