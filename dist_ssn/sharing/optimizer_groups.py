"""Parameter groups for an optimizer: what decays, and at which rate a bank learns."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dist_ssn.errors import UserError
from dist_ssn.sharing.bank import banks_of

_EXPONENT = 3 / 8
"""How the rate under Adam grows with the number of uses (measured: docs/results/quality.md)."""


def parameter_groups(model: nn.Module, weight_decay: float = 0.01, lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: banks, differences and matrices decay; gains, coefficients, biases and norms don't.

    Works on dense models too, so that both are trained alike.

    Args:
        weight_decay: of those that decay.
        lr: the dense model's learning rate, for Adam and its relatives. They move every number by about the rate, however many
            weights pull at it; a number that stands for many must move further. So each bank, and what its weights have of
            their own, get `adam_rate` for the bank's uses; biases and norms that for the whole model's; decay stays as strong
            as at `lr`. Leave it out with SGD, whose steps grow with the uses by themselves.

    Raises:
        UserError: a number that no optimizer could use.
    """
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay must be 0 or more, got {weight_decay!r}")
    if lr is not None and not 0 < lr < math.inf:
        raise UserError(f"lr must be a number above 0, or None to leave rates to the optimizer, got {lr!r}")
    banks = banks_of(model)
    of_bank = {id(p): bank for bank in banks for p in bank.parameters(recurse=False)}
    decayed = {id(p) for bank in banks for p in (bank.bank, bank.differences)}
    numel, size = (sum(getattr(bank.group, name) for bank in banks) for name in ("numel", "size"))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        bank = of_bank.get(id(parameter))
        decays = id(parameter) in decayed or (bank is None and parameter.ndim >= 2)
        factor = 1.0
        if lr is not None and bank is not None:
            factor = adam_rate(1.0, bank.group.numel / bank.group.size)
        elif lr is not None and banks and parameter.ndim < 2:
            factor = adam_rate(1.0, numel / size)
        groups.setdefault((factor, decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay / factor if decays else 0.0}
        | ({} if lr is None else {"lr": lr * factor})
        for (factor, decays), parameters in groups.items()
    ]


def adam_rate(lr: float, uses: float) -> float:
    """The rate under Adam of numbers that stand for `uses` numbers each, where the dense model's is `lr`."""
    return lr * max(1.0, uses) ** _EXPONENT
