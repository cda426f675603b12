"""Gradients delayed by one step: they are sent while the next step computes; a process waits only for a slower network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.engines.overlap.sums import Start, Sum
from dist_ssn.torch_private import at_end_of_backward

PREFIX = "delay_"
"""Prefix of a delay's entries in the optimizer's state of a checkpoint."""
_DECAY, _TINY = 0.95, 1e-12


@dataclass
class _DelayedStep:
    """The gradients of one step, as a sum in progress or as a mean, and the parameters they were computed at. All flat."""

    sum: Sum | None
    mean: Tensor | None
    parameters: Tensor


class Delay:
    """Gives each step the mean gradients of the previous step, sent in one message; the first step gets zeros.

    The correction estimates the gradient at the current parameters w from the gradient g at the previous ones v:

        g(w) ≈ g + strength · g² / √m · (w - v),  m = running mean of g²

    Args:
        parameters: all trainable parameters, by name.
        correction: its strength; 0 for none.
        start: starts a sum over all processes.
        world_size: number of processes.

    Source: Zheng et al. 2017, arXiv 1609.08326, section 4 and its adaptive form (there for asynchronous workers).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], correction: float, start: Start, world_size: int):
        self._named, self.parameters = dict(parameters), set(parameters.values())
        self._correction, self._start, self._world_size = correction, start, world_size
        self._square: Tensor | None = None
        self._pending: _DelayedStep | None = None

    def arm(self, loss: Tensor) -> None:
        """Prepares the step's last backward, that of `loss`: after it, gradients are the means of the previous step."""
        loss.register_hook(lambda _: at_end_of_backward(self._exchange))

    def stepped(self) -> None:
        """Does nothing: there is no state to reset."""

    def _exchange(self) -> None:
        before = self._pending
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._named.values()]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._pending = _DelayedStep(self._start(flat), None, self._flat_parameters())
        at_end_of_backward(lambda: self._deliver(before))

    def _flat_parameters(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._named.values()])

    def _deliver(self, before: _DelayedStep | None) -> None:
        """Replaces this step's gradients by the previous step's, corrected."""
        mean = torch.zeros_like(self._flat_parameters()) if before is None else self._corrected(before)
        for parameter, part in zip(self._named.values(), mean.split(self._sizes()), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def _corrected(self, before: _DelayedStep) -> Tensor:
        mean = self._arrived(before)
        if not self._correction:
            return mean
        square = mean.square()
        self._square = square if self._square is None else torch.lerp(square, self._square, _DECAY)
        slope = square / (self._square + _TINY).sqrt()
        return mean + self._correction * slope * (self._flat_parameters() - before.parameters)

    def _arrived(self, pending: _DelayedStep) -> Tensor:
        if pending.mean is None:
            assert pending.sum is not None
            pending.mean, pending.sum = pending.sum.wait() / self._world_size, None
        return pending.mean

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The delay's entries in a checkpoint, in the form of an optimizer's state; waits for the sum in progress."""
        flat: dict[str, Tensor] = {}
        if self._pending is not None:
            flat = {"mean": self._arrived(self._pending), "parameters": self._pending.parameters}
        if self._square is not None:
            flat["square"] = self._square
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self._named}
        for key, values in flat.items():
            for (name, p), part in zip(self._named.items(), values.split(self._sizes()), strict=True):
                state[name][PREFIX + key] = part.view_as(p)
        return state

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Loads the result of `state`, on any number of processes."""
        device = next(iter(self.parameters)).device

        def flat(key: str) -> Tensor | None:
            parts = [state.get(name, {}).get(PREFIX + key) for name in self._named]
            if any(part is None for part in parts):
                return None
            return torch.cat([torch.as_tensor(part).reshape(-1) for part in parts]).to(device)

        mean, parameters, self._square = flat("mean"), flat("parameters"), flat("square")
        self._pending = None if mean is None or parameters is None else _DelayedStep(None, mean, parameters)

    def _sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self._named.values()]


def without_delay(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """An optimizer's state without a delay's entries."""
    return {
        name: {key: value for key, value in entries.items() if not key.startswith(PREFIX)}
        for name, entries in state.items()
    }
