"""`initialize`: the initial values of a shared model that was built on the meta device."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping

from torch import nn

from dist_ssn.errors import ShareError
from dist_ssn.plan.scales import changed_scales
from dist_ssn.sharing.bank import banks_of


def initialize(model: nn.Module, stds: Mapping[str, float] | None = None) -> nn.Module:
    """Gives all banks of a shared model their initial values, as `share` does, in place.

    A model that was shared on the meta device needs it after `model.to_empty(device=…)`. Own parameters, such as biases and norms,
    are not touched: initialize them as for dense training.

    Args:
        model: shared, with storage.
        stds: a weight's name, or a glob over names → initial standard deviation, for weights whose initializer draws otherwise than
            `share` has assumed on the meta device; the first entry that matches applies.

    Returns:
        The model.

    Raises:
        ShareError: the model is not shared, or has no storage; a glob matches nothing, or its value is not above 0.
    """
    banks = banks_of(model)
    if not banks:
        raise ShareError(f"{type(model).__name__} has no banks to initialize: share it first")
    if any(bank.bank.is_meta for bank in banks):
        raise ShareError(f"{type(model).__name__} is on 'meta': call model.to_empty(device=…) first")
    names = [slot.name for bank in banks for slot in bank.group.slots]
    for glob, std in (stds or {}).items():
        if not any(_is_named(name, glob) for name in names):
            raise ShareError(f"{glob!r} matches no weight: the weights are {', '.join(names[:3])}, …")
        if not 0 < std < math.inf:
            raise ShareError(f"the standard deviation of {glob!r} is {std}: it must be a number above 0")
    found = {name: std for name in names for glob, std in reversed([*(stds or {}).items()]) if _is_named(name, glob)}
    for bank in banks:
        scales = tuple(bank.scales.tolist())
        is_changed = any(slot.name in found for slot in bank.group.slots)
        bank.reset_parameters(changed_scales(bank.group, scales, found) if is_changed else None)
    return model


def _is_named(name: str, glob: str) -> bool:
    return name == glob or fnmatch.fnmatchcase(name, glob)
