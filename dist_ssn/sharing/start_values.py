"""A bank's initial values, compared with those of `share` before they are first used: loops over parameters may draw others.

The usual loop, `if p.dim() > 1: nn.init.xavier_uniform_(p)`, takes a bank for a matrix with one column.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

_OTHER = 1.5
"""Factor from which on a standard deviation is another one. No bank has been trained when it is compared."""


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
    bank.at_start = False
    if bank.steps_before != steps_taken():
        return  # the values may be trained ones, copied from another model, or their average
    if bank.bank.is_meta or hasattr(bank.bank, "device_mesh"):
        return
    wanted = float(bank.scales[0])
    std = float(torch.linalg.vector_norm(bank.bank.detach())) / math.sqrt(bank.bank.numel())
    if not wanted / _OTHER <= std <= wanted * _OTHER:
        warnings.warn(
            f"the bank of {bank.weight_name(0)} has a standard deviation of {std:.3g}, and share() gave it {wanted:.3g}: a loop "
            "over parameters that draws initial values belongs before share(); dist_ssn.initialize(model) gives banks theirs again",
            stacklevel=3,
        )


def check_starts(model: nn.Module) -> None:
    """`check_start` for all banks of a model that need it.

    Args:
        model: shared or dense; other ranks are about to send it their values.
    """
    for module in model.modules():
        if module.__dict__.get("at_start", False):
            check_start(module)
