"""Changes of a model that are no steps of the watched optimizer: a round would not average them, or count them as training."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.sync.settings import held
from dist_ssn.sync.trained import Trained

_closed: weakref.WeakKeyDictionary[Optimizer, dict[int, int]] = weakref.WeakKeyDictionary()
"""Optimizers whose LocalUpdates have ended → the versions of their parameters at that time, by id."""


def note_end(optimizer: Optimizer) -> None:
    """The LocalUpdates of an optimizer have ended; the last round has averaged its parameters."""
    _closed[optimizer] = {id(p): p._version for group in optimizer.param_groups for p in group["params"]}


class Changes:
    """Finds what else changes a model than the steps of the optimizer whose rounds are averaged.

    Args:
        model: all workers hold the same values now.
        optimizer: whose parameters the rounds average.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine}
        self._others = {name: (p, p._version) for name, p in others.items()}
        self._is_new, self._early = True, ""

    def forget(self) -> None:
        """Values have come from a state, so this worker may be in the middle of a round."""
        self._is_new = False

    def before_step(self, start: Sequence[Tensor], trained: Sequence[Trained]) -> None:
        """Compares the trained parameters before the first step with those that all workers got.

        Args:
            start: what they got.
            trained: the parameters now.
        """
        if not self._is_new:
            return
        self._is_new = False
        moved = (t.name for begin, t in zip(start, trained, strict=True) if not torch.equal(begin, t.values))
        self._early = next(moved, "")

    def problem(self) -> str | None:
        """A sentence about a change that was found, for an error on all workers; None if there is none."""
        if self._early:
            return (
                f"{self._early} was changed between the making of LocalUpdates and the first step, which would count as training: "
                "load values before LocalUpdates is made, or by its load_state_dict"
            )
        watched = {id(p) for optimizer in held for group in optimizer.param_groups for p in group["params"]}
        for name, (parameter, version) in self._others.items():
            averaged = {version, *(versions.get(id(parameter), version) for versions in _closed.values())}
            if parameter._version not in averaged and id(parameter) not in watched:
                return (
                    f"{name} has changed, and no LocalUpdates averages it, because it is not in the optimizer: give each optimizer "
                    "a LocalUpdates of its own"
                )
        return None
