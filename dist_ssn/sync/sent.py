"""Changes that are on their way, and what is known about an exchange afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Round:
    """Record of an exchange.

    Args:
        step: number of steps that were made when the changes were sent.
        norms: of the workers' changes, by place in the group.
        left_out: places of workers whose change did not count.
        agreement: mean cosine between two workers' changes, weighted by their norms: 1 if all agree, 0 if they are orthogonal. None
            with one worker or with sharded parameters; and where what arrives says too little of the changes: with a codec of fewer
            than four bits, or in a round that `synchronize` cuts short, in which a codec sends what it has kept of longer ones.
    """

    step: int
    norms: tuple[float, ...]
    left_out: tuple[int, ...]
    agreement: float | None


@dataclass
class Sent:
    """A worker's change that is on its way, or the mean change that has arrived.

    Args:
        wait: waits for the mean over all workers, in which those that are left out have zeros; None after the arrival.
        mean: the mean over the workers that count; None before the arrival.
        norms: see `Round`.
        left_out: see `Round`.
        step: see `Round`.
        is_whole: the round was not cut short.
    """

    wait: Callable[[], Tensor] | None
    mean: Tensor | None
    norms: tuple[float, ...]
    left_out: tuple[int, ...]
    step: int
    is_whole: bool = True

    def arrived(self) -> Tensor:
        """The mean; waits for it."""
        if self.mean is None:
            assert self.wait is not None
            mean, self.wait = self.wait(), None
            counted = len(self.norms) - len(self.left_out)
            mean = mean * (len(self.norms) / counted) if self.left_out else mean
            self.mean = mean
            return mean
        return self.mean

    def agreement(self) -> float | None:
        """See `Round`; from the norms of the changes c and of their mean, for |Σ c|² = Σ |c|² + Σ c · c'."""
        norms = [norm for place, norm in enumerate(self.norms) if place not in self.left_out]
        squares = sum(norm * norm for norm in norms)
        products = sum(norms) ** 2 - squares
        if products <= 0:
            return None
        of_sum = len(norms) * float(torch.linalg.vector_norm(self.arrived(), dtype=torch.float64))
        return (of_sum * of_sum - squares) / products

    def state(self) -> dict[str, Any]:
        """The arrived mean and what belongs to it, for a checkpoint; waits for the mean."""
        return {
            "mean": self.arrived().clone(),
            "norms": list(self.norms),
            "left_out": list(self.left_out),
            "step": self.step,
        }

    @staticmethod
    def of_state(state: Mapping[str, Any], device: torch.device) -> Sent:
        """The reverse of `state`."""
        return Sent(None, state["mean"].to(device), tuple(state["norms"]), tuple(state["left_out"]), state["step"])
