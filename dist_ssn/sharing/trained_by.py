"""Shared layers and models of this process, and what optimizers hold of them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All shared layers."""
roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All models that were given to `share`."""
checked: weakref.WeakKeyDictionary[Optimizer, tuple[Any, int, int]] = weakref.WeakKeyDictionary()
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
