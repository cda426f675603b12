"""Parameter groups for an optimizer: weight decay, and a bank's learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dist_ssn.errors import UserError
from dist_ssn.sharing.bank import banks_of

_EXPONENT = 3 / 8
"""Exponent with which the learning rate under Adam grows with the uses (measured: docs/results/quality.md)."""


def parameter_groups(model: nn.Module, weight_decay: float = 0.01, lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices, banks and differences decay; gains, coefficients, biases and norms don't.

    It works on dense models, too, so that both are trained in the same way.

    Args:
        model: shared or dense.
        weight_decay: of the parameters that decay.
        lr: the dense model's learning rate, for Adam and its relatives. Their steps are about as large as the learning rate,
            however many weights use a parameter; but a parameter with many uses must move further. So each bank, with the
            coefficients, gains and differences of its weights, gets `adam_learning_rate` for the bank's uses; biases and norms get
            it for the whole model's uses. The strength of weight decay stays that of `lr`. Leave it out with SGD, whose steps grow
            with the uses anyway.

    Returns:
        Groups with "params", "weight_decay", and "lr" if it is given.

    Raises:
        UserError: `weight_decay` is below 0, or `lr` is not above 0.
    """
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay must be 0 or more, got {weight_decay!r}")
    if lr is not None and not 0 < lr < math.inf:
        raise UserError(f"lr must be a number above 0, or None to leave learning rates to the optimizer, got {lr!r}")
    banks = banks_of(model)
    of_bank = {id(p): bank for bank in banks for p in bank.parameters(recurse=False)}
    numel, size = (sum(getattr(bank.group, name) for bank in banks) for name in ("numel", "size"))
    param_groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        bank = of_bank.get(id(parameter))
        factor = 1.0
        if lr is not None and bank is not None:
            factor = adam_learning_rate(1.0, bank.group.numel / bank.group.size)
        elif lr is not None and banks and parameter.ndim < 2:
            factor = adam_learning_rate(1.0, numel / size)
        param_groups.setdefault((factor, parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay / factor if decays else 0.0}
        | ({} if lr is None else {"lr": lr * factor})
        for (factor, decays), parameters in param_groups.items()
    ]


def adam_learning_rate(lr: float, uses: float) -> float:
    """Learning rate under Adam of parameters with `uses` uses each.

    Args:
        lr: the dense model's learning rate.
        uses: number of weight elements that are generated from one parameter.
    """
    return lr * max(1.0, uses) ** _EXPONENT
