"""The training loss between two looks at it, without making the host wait in a step."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max


class Losses:
    """The sum of the losses since the last look, and the first step whose loss was not finite."""

    def __init__(self, device: torch.device):
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first_bad = torch.tensor(_NEVER, device=device)
        self._count = 0

    def add(self, step: int, loss: Tensor) -> None:
        self._sum += loss
        bad = torch.where(torch.isfinite(loss), self._first_bad, torch.full_like(self._first_bad, step))
        self._first_bad = torch.minimum(self._first_bad, bad)
        self._count += 1

    def take(self, ranks: int) -> tuple[float, int | None]:
        """(the mean loss of all ranks since the last call, the first step that was not finite on any, if there is one).

        Two small collectives at most, the same ones on every rank.
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
