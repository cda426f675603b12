"""Shared layers and models of this process, and what optimizers hold of them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All shared layers."""
roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All models that were given to `share`, and their copies that an optimizer trains."""
_AT_ONCE = 32
"""Number of flags, and of learning rates, that one step compares."""


class Seen:
    """What the check of an optimizer has seen.

    Each step compares some of the flags and learning rates, spread over the model, so that its cost does not grow with the model. A
    part that is frozen has several of them, and is found in one of the next steps.
    """

    def __init__(self, optimizer: Optimizer, models: int, before: Seen | None):
        self.groups, self.size, self.models = optimizer.param_groups, len(optimizer.param_groups), models
        self.told: set[str] = before.told if before else set()
        self.waiting: list[str] = before.waiting if before else []  # to be said if this optimizer takes another step
        self.checks: int = before.checks + 1 if before else 1
        self._turn = 0
        self._turns: list[tuple[list[Tensor], list[Any], list[dict[str, Any]], Any]] = []

    def watch(self, parameters: Sequence[Tensor], banks: Sequence[Any]) -> None:
        """Begins to compare.

        Args:
            parameters: their `requires_grad` is compared.
            banks: their frozen weights are compared.
        """
        refs = [weakref.ref(bank) for bank in banks]
        # A learning rate that is a tensor is left out, since a comparison might wait for a GPU.
        groups = [] if any(isinstance(group.get("lr"), Tensor) for group in self.groups) or not banks else self.groups
        turns = max(1, math.ceil(max(len(parameters), len(refs), len(groups)) / _AT_ONCE))
        for turn in range(turns):
            some = list(parameters[turn::turns]), refs[turn::turns], groups[turn::turns]
            self._turns.append((*some, self._state(*some)))

    def has_changed(self) -> bool:
        """True if a flag or a learning rate is another one, among those that it is the turn of."""
        self._turn = (self._turn + 1) % len(self._turns)
        parameters, banks, groups, state = self._turns[self._turn]
        return self._state(parameters, banks, groups) != state

    def _state(self, parameters: list[Tensor], banks: list[Any], groups: list[dict[str, Any]]) -> Any:
        """Flags, frozen weights, and which learning rates are the first group's: schedules change all of them."""
        first = self.groups[0].get("lr") if groups else None
        return (
            [p.requires_grad for p in parameters],
            [getattr(bank(), "frozen", None) for bank in banks],
            [group.get("lr") == first for group in groups],
        )


checked: weakref.WeakKeyDictionary[Optimizer, Seen] = weakref.WeakKeyDictionary()
"""Optimizers that have taken a step → what `part_check.py` saw of them."""


def is_a(thing: Any, kind: type) -> bool:
    """`isinstance` by the object's real class, which runs no code of the object (proxies answer `__class__`)."""
    return issubclass(type(thing), kind)


def held_by(optimizer: Optimizer) -> dict[int, Tensor]:
    """Id → parameter, for all that an optimizer holds."""
    param_groups = getattr(optimizer, "param_groups", None) or []
    return {id(p): p for param_group in param_groups for p in param_group["params"]}


def holds(held: dict[int, Tensor], source: Any) -> bool:
    """True if `held` has a parameter of a source that trains."""
    return any(id(p) in held for p in source.parameters() if p.requires_grad)
