"""A bank's initial values, compared with those of `share` before they are first used: loops over parameters may draw others.

The usual loop, `if p.dim() > 1: nn.init.xavier_uniform_(p)`, takes a bank for a matrix with one column.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from dist_ssn.sharing.initial_values import initial_values
from dist_ssn.sharing.trained_by import layers
from dist_ssn.torch_private import dispatch_mode_is_on

_OTHER = 1.5
"""Factor from which on a standard deviation is another one. No bank has been trained when it is compared."""
_ALIKE = 5.0
"""Cosine with the initial values, in its standard deviations for values of another draw, from which on they are no other draw."""

_steps = {"taken": 0}


def note_step() -> None:
    """An optimizer is about to take a step."""
    _steps["taken"] += 1


def steps_taken() -> int:
    """Number of steps of all optimizers of this process since the first `share`."""
    return _steps["taken"]


def check_start(bank: Any) -> None:
    """Warns, once, if somebody else has drawn the initial values of a bank.

    Args:
        bank: a `Bank` whose values nobody has read, loaded or received since `reset_parameters`.
    """
    if dispatch_mode_is_on():
        return
    bank.at_start = False
    if bank.steps_before != steps_taken():
        return  # the values may be trained ones, copied from another model, or their average
    if bank.bank.is_meta or hasattr(bank.bank, "device_mesh"):
        return
    wanted = float(bank.scales[0])
    std = float(torch.linalg.vector_norm(bank.bank.detach())) / math.sqrt(bank.bank.numel())
    if not wanted / _OTHER <= std <= wanted * _OTHER and not _is_trained(bank):
        warnings.warn(
            f"the bank of {bank.weight_name(0)} has a standard deviation of {std:.3g}, and share() gave it {wanted:.3g}: a loop "
            "over parameters that draws initial values belongs before share(), and dist_ssn.initialize(model) gives banks theirs "
            "again; trained values are loaded by load_state_dict(…), which has the scales of weights, too",
            stacklevel=3,
        )


def _is_trained(bank: Any) -> bool:
    """True if a bank was not drawn: it is like `share`'s initial values, or a copy of another bank of this process."""
    values = bank.bank.detach()
    start = torch.from_numpy(initial_values(bank.group, bank.seed, 1.0)["bank"]).to(values.device, values.dtype)
    likeness = float(torch.nn.functional.cosine_similarity(values.flatten(), start.flatten(), dim=0))
    if likeness > _ALIKE / math.sqrt(values.numel()):
        return True
    slots = (layer.__dict__.get("_dist_ssn_slots", {}) for layer in list(layers))
    others = {source for own in slots for source, _ in own.values() if source is not bank}
    return any(_has(other, values) for other in others)


def _has(other: Any, values: torch.Tensor) -> bool:
    """True if another source of weights has the same values."""
    theirs = other._parameters.get("bank")
    if theirs is None or theirs.shape != values.shape or theirs.device != values.device:
        return False
    return torch.equal(theirs.detach(), values)


def check_starts(model: nn.Module) -> None:
    """`check_start` for all banks of a model that need it.

    Args:
        model: shared or dense; other ranks are about to send it their values.
    """
    for module in model.modules():
        if module.__dict__.get("at_start", False):
            check_start(module)
