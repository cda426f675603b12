"""The training loss, summed on the device so that the host waits only when it reads the sum."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max


class Losses:
    """Sum of the losses since the last `take`, and the first step whose loss was not finite.

    Args:
        device: of the losses.
        apart: ranks train apart, and leave out of their mean whoever has diverged: what is not finite does not count, unless
            nothing else is there.
    """

    def __init__(self, device: torch.device, *, apart: bool = False):
        self._total = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of losses
        self._first_bad = torch.tensor(_NEVER, device=device)
        self._apart = apart

    def add(self, step: int, loss: Tensor) -> None:
        """Adds this rank's loss of a step, a scalar."""
        finite = torch.isfinite(loss)
        counted = torch.stack([loss, torch.ones_like(loss)])
        self._total += torch.where(finite, counted, 0) if self._apart else counted
        bad = torch.where(finite, self._first_bad, torch.full_like(self._first_bad, step))
        self._first_bad = torch.minimum(self._first_bad, bad)

    def take(self, ranks: int) -> tuple[float, int | None]:
        """The mean loss since the last call; costs at most two small collectives, the same ones on every rank.

        Args:
            ranks: number of ranks.

        Returns:
            (mean over all ranks and steps, the first step whose loss was not finite on any rank, or None if the mean is finite).
        """
        if ranks > 1:
            dist.all_reduce(self._total)
        total, count = self._total.tolist()
        mean = total / count if count else math.nan
        self._total.zero_()
        if math.isfinite(mean):
            return mean, None
        if ranks > 1:
            dist.all_reduce(self._first_bad, op=dist.ReduceOp.MIN)
        return mean, int(self._first_bad.item())
