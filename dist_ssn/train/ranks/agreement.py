"""Agreement of all ranks on an action at the same step.

A rank's request becomes an action of all ranks. An asynchronous all-gather of four int32 starts after one step and is read after
the next, so it overlaps with compute. It happens about every three seconds. Between two hosts Gloo sends half as many packets for
it as for an all-reduce, and at this size only packets count.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_ssn.torch_private import all_gather_single

ASK_SECONDS = 3.0


@dataclass(frozen=True)
class Wants:
    """Requests of one rank; after agreement, the requests of any rank.

    Args:
        stop: number of the signal that preempts the run, 0 for none.
        save: a checkpoint is due.
        failed: writing a checkpoint in the background has failed.
    """

    stop: int = 0
    save: bool = False
    failed: bool = False

    def __bool__(self) -> bool:
        return bool(self.stop or self.save or self.failed)


class Agreement:
    """Collects the requests of all ranks; all ranks call `after_step` after every step."""

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size, self._device = world_size, device
        self._work: dist.Work | None = None
        self._mine = torch.zeros(4, dtype=torch.int32, device=device)
        self._everyone = torch.zeros(4 * world_size, dtype=torch.int32, device=device)
        self._asked_at, self._asked_step, self._next_step = time.monotonic(), -1, 0

    def after_step(self, step: int, mine: Wants) -> Wants:
        """Requests that any rank made one step ago; none, on all ranks, if they were not exchanged."""
        if self._world_size == 1:
            return mine
        if self._work is not None:
            return self.answer(step)
        if step >= self._next_step:
            now = time.monotonic()
            made = step - self._asked_step if self._asked_step >= 0 else 1
            rate = made / max(now - self._asked_at, 1e-3)
            self._asked_at, self._asked_step = now, step
            interval = max(1, math.ceil(rate * ASK_SECONDS))
            wants = [mine.stop, int(mine.save), int(mine.failed), interval]
            self._mine.copy_(torch.tensor(wants, dtype=torch.int32))
            self._work = all_gather_single(self._everyone, self._mine, async_op=True)
        return Wants()

    def answer(self, step: int) -> Wants:
        """Waits for the exchange in flight, if there is one; all ranks call it at the same step."""
        if self._work is None:
            return Wants()
        self._work.wait()
        self._work = None
        stop, save, failed, interval = self._everyone.view(-1, 4).amax(0).tolist()
        self._next_step = step + interval
        return Wants(stop, bool(save), bool(failed))
