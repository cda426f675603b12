"""`Replica`: a worker's parameters and buffers, beside the values that all workers hold in common.

Letter: S = elements of all trained parameters of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.sync.anchor import Anchor
from dist_ssn.sync.buffers import Buffers
from dist_ssn.sync.reports import Workers


class Replica:
    """A worker's copy of the model, which it trains apart from the others.

    Args:
        model: all workers hold its current values alike.
        anchor: of its trained parameters.

    Attributes:
        anchor: the parameters that all workers hold in common.
        buffers: the model's, beside those that all held after the last average.
        start: the values from which this worker went on after the last round.
    """

    def __init__(self, model: nn.Module, anchor: Anchor) -> None:
        self.anchor, self.buffers = anchor, Buffers(model)
        self.take()

    def take(self) -> None:
        """All go on from the current parameters."""
        self.anchor.fill()
        self.start = self.anchor.start()

    def change(self) -> Tensor:
        """`start` less the current parameters, float32 [S]; see `Anchor.change`."""
        return self.anchor.change(self.start)

    def go_on(self, late: Tensor | None = None) -> None:
        """Goes on from the anchor.

        Args:
            late: this worker's own change [S], if its mean is on its way and so not in the anchor yet.
        """
        self.anchor.hand_out(late)
        self.start = self.anchor.start() if late is None else self._parameters()

    def as_anchor(self, workers: Workers) -> Callable[[], None]:
        """Gives the model the anchor and the mean of all workers' buffers; the function that is returned puts back what it had."""
        parameters, buffers = self._parameters(), self.buffers.own()
        mean = self.buffers.mean(workers)
        self.anchor.hand_out()
        self.buffers.put(mean)

        def put_back() -> None:
            self._set(parameters)
            self.buffers.put({**self.buffers.base, **buffers})

        return put_back

    def state_dict(self, *, own_start: bool) -> dict[str, Any]:
        """The values in common, and this worker's progress in a round that is not over.

        Args:
            own_start: this worker went on from other values than the anchor's.
        """
        moved = not all(torch.equal(start, t.values) for start, t in zip(self.start, self.anchor.trained, strict=True))
        return {
            "anchor": [flat.clone() for flat in self.anchor.flats],
            "parameters": self._parameters() if moved else [],
            "start": [start.clone() for start in self.start] if own_start else [],
            "buffers": {name: buffer.clone() for name, buffer in self.buffers.base.items()},
            "own_buffers": self.buffers.own() | self.buffers.counters(),
        }

    def load_common(self, state: Mapping[str, Any]) -> None:
        """Goes on from the values in common of a state, which `check_state` has checked."""
        for flat, saved in zip(self.anchor.flats, state["anchor"], strict=True):
            flat.copy_(saved)
        common = {name: base.clone() for name, base in state["buffers"].items() if name in self.buffers.base}
        self.buffers.base |= common
        self.buffers.put(self.buffers.base)
        self.buffers.put_counters(state["own_buffers"])
        self.go_on()

    def load_own(self, state: Mapping[str, Any]) -> None:
        """Takes this worker's progress in a round from its own state, after `load_common`."""
        if state["start"]:
            pairs = zip(state["start"], self.start, strict=True)
            self.start = [saved.to(start).view_as(start) for saved, start in pairs]
        self._set(state["parameters"] or self.start)
        self.buffers.put(state["own_buffers"])

    def _parameters(self) -> list[Tensor]:
        return [t.values.clone() for t in self.anchor.trained]

    def _set(self, parameters: list[Tensor]) -> None:
        for t, values in zip(self.anchor.trained, parameters, strict=True):
            t.values.copy_(values.view_as(t.values))
